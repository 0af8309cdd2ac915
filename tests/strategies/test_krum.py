"""Krum and Multi-Krum by hand, what they withstand, and Flower's."""

import pytest
import torch
from flwr.serverapp.strategy import Krum, MultiKrum

from fedtailor.strategies import fedavg, krum, multi_krum
from fedtailor.strategies.krum import scores
from fedtailor.strategies.stacked import distances

LINE = [[0.0], [1.0], [3.0], [4.0], [20.0]]  # with one attacker each is judged by its 5 - 1 - 2 = 2 nearest


def test_scores_are_squared_distances_to_the_nearest():
    apart = distances({"w": torch.tensor(LINE)})
    assert scores(apart, 1).tolist() == pytest.approx([1 + 9, 1 + 4, 1 + 4, 1 + 9, 256 + 289], rel=1e-4)


def test_a_distance_is_over_all_tensors_together():
    apart = distances({"a": {"w": torch.tensor([[0.0], [3.0]])}, "b": torch.tensor([[[0.0, 1.0]], [[4.0, 1.0]]])})
    torch.testing.assert_close(apart, torch.tensor([[0.0, 25.0], [25.0, 0.0]]).double())


def test_krum_is_the_reply_with_the_least_score(end):
    assert end(krum(), [[0.0], [1.0], [1.75], [2.5], [20.0]]) == [1.75]  # score 1.125; that of 1 is 1.5625


def test_multi_krum_is_the_mean_of_the_best(end):
    assert end(multi_krum(keep=2), LINE) == pytest.approx([2])
    assert end(multi_krum(), LINE) == pytest.approx([2])  # all but one: 0, 1, 3 and 4


@pytest.mark.parametrize("strategy", [krum(attackers=2), multi_krum(attackers=2)])
@pytest.mark.parametrize("lie", [[30.0, 30.0], [1e20, -1e20], [3e38, 3e38]])
def test_liars_who_stand_together_are_left_out(strategy, lie, end):
    honest = [[1.0, 0.0], [1.1, 0.0], [1.2, 0.1], [0.9, 0.0], [1.0, 0.1]]
    x, y = end(strategy, [lie, *honest, lie])
    assert 0.9 <= x <= 1.2 and 0 <= y <= 0.1


def test_the_mutually_nearest_do_not_tie():
    """Judged by one neighbour, 0 and 1 have the same score; the next one decides, so that the order does not."""
    apart = distances({"w": torch.tensor([[0.0], [1.0], [5.0], [99.0]])})
    assert scores(apart, 1).argmin() == 1


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (krum(attackers=2), Krum(num_malicious_nodes=2)),
        (multi_krum(attackers=2, keep=5), MultiKrum(num_malicious_nodes=2, num_nodes_to_select=5)),
    ],
    ids=["krum", "multi_krum"],
)
@pytest.mark.parametrize("seed", range(3))
def test_flower_agrees(ours, theirs, seed, step, flower, start, around):
    replies = around(start, 9, seed)
    mine = step(ours, ours.init(start), replies)["params"]
    torch.testing.assert_close(mine, flower(theirs, start, replies), rtol=0, atol=1e-6)


def test_flower_trusts_a_chosen_clients_own_count(step, flower, start, around):
    """The paper's mean is plain. Flower weights it by ``num-examples``, so that a liar who is chosen says how much."""
    replies = around(start, 6, rows=[1, 1, 1, 1, 1, 1000])
    ours, theirs = multi_krum(attackers=0, keep=6), MultiKrum(num_nodes_to_select=6)
    mean = step(fedavg(weighting="equal"), ours.init(start), replies)["params"]
    torch.testing.assert_close(step(ours, ours.init(start), replies)["params"], mean, rtol=0, atol=1e-6)
    heavy = flower(theirs, start, replies)["w"]
    assert (heavy - replies[-1][0]["w"]).norm() < 0.1 * (mean["w"] - replies[-1][0]["w"]).norm()
