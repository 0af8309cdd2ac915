"""FedExP by hand: eta = max(1, mean |d_i|^2 / (2 (|mean d|^2 + eps)))."""

import pytest
import torch

from fedtailor.strategies import fedexp
from fedtailor.strategy import model_in


def moved(step, strategy, *clients):
    state = strategy.init({"w": torch.zeros(2), "b": torch.tensor(0.0)})
    replies = [({"w": torch.tensor([x, y]), "b": torch.tensor(z)}, rows) for rows, x, y, z in clients]
    params = step(strategy, state, replies)["params"]
    return [*params["w"].tolist(), params["b"].item()]


def test_clients_that_cancel_out_make_a_longer_step(step):
    # changes (3, 1, 2) and (-3, 1, 2): squares 14 and 14, mean (0, 1, 2) with square 5; eta = 14 / (2 * (5 + 0.6))
    eta = 14 / 11.2
    assert moved(step, fedexp(epsilon=0.6), (1, 3.0, 1.0, 2.0), (1, -3.0, 1.0, 2.0)) == pytest.approx([0, eta, 2 * eta])


def test_rows_weight_the_squares_as_they_weight_the_mean(step):
    # rows 1 and 3: mean square (1 * 16 + 3 * 4) / 4 = 7, mean change (4 - 6) / 4 = -0.5; eta = 7 / (2 * 0.25)
    ended = moved(step, fedexp(epsilon=1e-12), (1, 4.0, 0.0, 0.0), (3, -2.0, 0.0, 0.0))
    assert ended == pytest.approx([-0.5 * 14, 0, 0])


def test_clients_that_agree_make_it_fedavg(step):
    assert moved(step, fedexp(), (1, 3.0, 1.0, 2.0), (3, 3.0, 1.0, 2.0)) == pytest.approx([3, 1, 2])


def test_the_model_is_the_mean_of_the_last_two_iterates(step):
    strategy = fedexp()
    state = strategy.init({"w": torch.tensor(0.0)})
    for _ in range(2):
        state = step(strategy, state, [({"w": state["params"]["w"] + 4}, 1)])
    assert strategy.broadcast(state)["params"]["w"] == 8
    assert model_in(strategy.broadcast(state))["w"] == 6
