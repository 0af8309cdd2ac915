"""Server momentum: by hand, and side by side with Flower's."""

import pytest
import torch
from flwr.serverapp.strategy import FedAvgM

from fedtailor.strategies import fedavgm


def test_the_velocity_is_what_is_left_of_it_and_the_mean_change(step):
    strategy = fedavgm(server_lr=0.5, momentum=0.8)
    state = strategy.init({"w": torch.tensor(0.0)})
    for _ in range(2):  # rows 1 and 3 that end 4 and 8 away: the mean change is 7
        w = state["params"]["w"]
        state = step(strategy, state, [({"w": w + 4}, 1), ({"w": w + 8}, 3)])
    assert state["params"]["w"].item() == pytest.approx(0.5 * 7 + 0.5 * (0.8 * 7 + 7))


def test_flower_agrees_for_five_rounds(step, flower, start, around):
    ours, theirs = fedavgm(server_lr=0.7, momentum=0.9), FedAvgM(server_learning_rate=0.7, server_momentum=0.9)
    state, params = ours.init(start), start
    for round in range(1, 6):
        replies = around(params, 4, round, rows=[3.0, 10.0, 40.0, 7.0])
        state, params = step(ours, state, replies), flower(theirs, params, replies, round)
        torch.testing.assert_close(state["params"], params, rtol=0, atol=2e-6)
