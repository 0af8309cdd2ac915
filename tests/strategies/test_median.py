"""The median by hand, what it withstands, and Flower's."""

import pytest
import torch
from flwr.serverapp.strategy import FedMedian

from fedtailor.strategies import fedavg, median


def test_each_coordinate_has_its_own(end):
    assert end(median(), [[1.0, 9.0], [2.0, 8.0], [30.0, 7.0]]) == [2.0, 8.0]


def test_of_an_even_number_it_is_the_mean_of_the_middle_two(end):
    assert end(median(), [[1.0, 1.0], [2.0, 2.0], [4.0, 3.0], [9.0, 4.0]]) == [3.0, 2.5]


def test_the_middle_of_two_great_values_does_not_overflow(end):
    assert end(median(), [[2e38], [3e38]]) == pytest.approx([2.5e38])


def test_the_strategy_inside_applies_it(end):
    assert end(median(fedavg(server_lr=0.5)), [[2.0, 4.0]]) == [1.0, 2.0]


@pytest.mark.parametrize("lie", [1e9, -1e9, 3e38])
def test_fewer_than_half_cannot_drag_it_out_of_what_the_honest_say(lie, end):
    ended = end(median(), [[1.0, 1.0], [1.1, 1.1], [1.2, 1.2], [lie, lie], [lie, lie]])
    assert all(1.0 <= w <= 1.2 + 1e-6 for w in ended)


@pytest.mark.parametrize("clients", [5, 6])
def test_flower_agrees(clients, step, flower, start, around):
    replies = around(start, clients, rows=range(1, clients + 1))
    ours = step(median(), median().init(start), replies)["params"]
    torch.testing.assert_close(ours, flower(FedMedian(), start, replies), rtol=0, atol=1e-6)
