"""The norm bound by hand."""

import pytest
import torch

from fedtailor.strategies import fedavg, fedavgm, norm_bound


def test_a_longer_reply_is_shortened_and_a_shorter_one_is_not(end):
    assert end(norm_bound(bound=5.0), [[30.0, 40.0], [1.0, 0.0]]) == pytest.approx([(3 + 1) / 2, 4 / 2])


def test_the_bound_is_of_all_tensors_together(step):
    strategy = norm_bound(bound=5.0)
    state = strategy.init({"w": torch.zeros(1), "b": torch.zeros(())})
    params = step(strategy, state, [({"w": torch.tensor([6.0]), "b": torch.tensor(8.0)}, 1.0)])["params"]
    assert [params["w"].item(), params["b"].item()] == pytest.approx([3, 4])


def test_by_default_it_is_the_median_of_the_norms(end):
    assert end(norm_bound(), [[1.0], [2.0], [-1e9]]) == pytest.approx([(1 + 2 - 2) / 3])


def test_rows_do_not_count(step):
    """What a client says of its own rows would be another way to shout."""
    strategy = norm_bound(fedavg(weighting="examples"), bound=5.0)
    state = step(
        strategy, strategy.init({"w": torch.zeros(1)}), [({"w": torch.ones(1)}, 1), ({"w": -torch.ones(1)}, 99)]
    )
    assert state["params"]["w"].item() == 0


def test_it_goes_round_any_strategy(step):
    strategy = norm_bound(fedavgm(momentum=0.5), bound=1.0)
    state = strategy.init({"w": torch.zeros(1)})
    for _ in range(2):
        state = step(strategy, state, [({"w": state["params"]["w"] + 9}, 1)])
    assert state["params"]["w"].item() == pytest.approx(1 + 1.5)
