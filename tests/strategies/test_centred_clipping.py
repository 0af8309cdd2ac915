"""Centred clipping by hand, over rounds."""

import pytest
import torch

from fedtailor.strategies import centred_clipping, fedavg, krum


def moved(step, strategy, *rounds):
    """The server's change in each round; a round is a list of deltas."""
    state, found = strategy.init({"w": torch.tensor([0.0, 0.0])}), []
    for deltas in rounds:
        w = state["params"]["w"]
        state = step(strategy, state, [({"w": w + torch.tensor(d)}, 1.0) for d in deltas])
        found.append((state["params"]["w"] - w).tolist())
    return found


def test_each_reply_moves_the_centre_by_no_more_than_the_radius(step):
    strategy = centred_clipping(radius=2.0)
    first, second = moved(step, strategy, [[1.0, 0.0], [0.0, 30.0]], [[1.0, 0.0], [0.0, 30.0]])
    assert first == pytest.approx([1 / 2, 2 / 2])  # from zero: (1, 0) in full, (0, 30) as (0, 2)
    far = (0.5**2 + 29**2) ** 0.5  # from (0.5, 1): (0.5, -1) in full, and (-0.5, 29) shortened to 2
    assert second == pytest.approx([0.5 + (0.5 - 0.5 * 2 / far) / 2, 1 + (-1 + 29 * 2 / far) / 2])


def test_more_iterations_come_closer(step):
    strategy = centred_clipping(radius=1.0, iterations=3)
    assert moved(step, strategy, [[10.0, 0.0], [10.0, 0.0]])[0] == pytest.approx([3, 0])


def test_a_large_radius_makes_it_the_mean(step):
    assert moved(step, centred_clipping(fedavg(server_lr=0.5), radius=1e6), [[1.0, 4.0], [3.0, 0.0]])[
        0
    ] == pytest.approx([1, 1])


def test_the_centre_is_not_cast():
    strategy = centred_clipping()
    assert strategy.broadcast(strategy.init({"w": torch.zeros(2)})).keys() == {"params"}


def test_one_state_has_one_centre():
    with pytest.raises(ValueError, match="one centre"):
        centred_clipping(krum(centred_clipping()))


def test_rows_do_not_count(step):
    strategy = centred_clipping(radius=1e6)
    replies = [({"w": torch.ones(1)}, 1.0), ({"w": -torch.ones(1)}, 99.0)]
    assert step(strategy, strategy.init({"w": torch.zeros(1)}), replies)["params"]["w"].item() == 0
