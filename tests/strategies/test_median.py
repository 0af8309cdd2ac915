"""The median by hand, and what it withstands."""

import pytest
import torch

from fedtailor import tree
from fedtailor.strategies import median
from fedtailor.strategy import Local


def end(strategy, deltas):
    state, acc = strategy.init({"w": torch.zeros(2)}), None
    for rows, delta in enumerate(deltas, 1):  # rows differ, and must not count
        params, count = {"w": torch.tensor(delta)}, torch.tensor(float(rows))
        local = Local(strategy.broadcast(state), {}, params, count, torch.tensor(1.0), 0.1)
        acc = strategy.reduce.add(acc, tree.at(strategy.report(local)[0], None))
    return strategy.apply(state, strategy.reduce.done(acc), 0)["params"]["w"].tolist()


def test_each_coordinate_has_its_own():
    assert end(median(), [[1.0, 9.0], [2.0, 8.0], [30.0, 7.0]]) == [2.0, 8.0]


def test_of_an_even_number_it_is_the_lower_middle():
    assert end(median(), [[1.0, 1.0], [2.0, 2.0], [4.0, 3.0], [9.0, 4.0]]) == [2.0, 2.0]


def test_the_server_takes_a_share():
    assert end(median(server_lr=0.5), [[2.0, 4.0]]) == [1.0, 2.0]


@pytest.mark.parametrize("lie", [1e9, -1e9])
def test_fewer_than_half_cannot_drag_it_out_of_what_the_honest_say(lie):
    ended = end(median(), [[1.0, 1.0], [1.1, 1.1], [1.2, 1.2], [lie, lie], [lie, lie]])
    assert all(1.0 <= w <= 1.2 + 1e-6 for w in ended)
