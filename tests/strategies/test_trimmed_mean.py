"""The trimmed mean by hand, what it withstands, and Flower's."""

import pytest
import torch
from flwr.serverapp.strategy import FedTrimmedAvg

from fedtailor.strategies import trimmed_mean


def test_the_extremes_of_each_coordinate_are_left_out(end):
    ended = end(trimmed_mean(attackers=1), [[1.0, 90.0], [2.0, 8.0], [4.0, 7.0], [30.0, -80.0]])
    assert ended == pytest.approx([3, 7.5])


def test_no_attackers_make_it_the_mean(end):
    assert end(trimmed_mean(attackers=0), [[1.0], [2.0], [6.0]]) == pytest.approx([3])


def test_more_attackers_than_a_minority_leave_the_middle(end):
    assert end(trimmed_mean(attackers=9), [[1.0], [2.0], [60.0]]) == pytest.approx([2])


@pytest.mark.parametrize("lie", [1e9, -1e9, 3e38])
def test_as_many_liars_as_said_cannot_drag_it_out_of_what_the_honest_say(lie, end):
    (ended,) = end(trimmed_mean(attackers=2), [[1.0], [1.1], [1.2], [lie], [lie]])
    assert 1.0 <= ended <= 1.2 + 1e-6


def test_flower_agrees(step, flower, start, around):
    """Flower is given a share to cut at each end: 0.2 of 10 are two."""
    replies = around(start, 10, rows=range(1, 11))
    ours = step(trimmed_mean(attackers=2), trimmed_mean().init(start), replies)["params"]
    torch.testing.assert_close(ours, flower(FedTrimmedAvg(beta=0.2), start, replies), rtol=0, atol=1e-6)
