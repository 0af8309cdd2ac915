"""FedProx by hand, on the loss (w - 1)^2 / 2."""

import pytest
import torch

from fedtailor import tree
from fedtailor.strategies import fedavg, fedavgm, fedprox, scaffold
from fedtailor.training import local_train


def walk(strategy, steps):
    train = local_train(lambda params, batch: {"w": params["w"] - 1}, strategy, lr=0.1)
    start = strategy.broadcast(strategy.init({"w": torch.tensor(0.0)}))
    summand, _ = train(start, {}, {}, torch.ones(steps), torch.tensor(1.0))
    return summand["delta"]["w"].item()


def test_two_steps():
    # w1 = 0.1 * 1; then the pull back is mu * w1 = 2 * 0.1, so w2 = 0.1 + 0.1 * (0.9 - 0.2)
    assert walk(fedprox(mu=2.0), 2) == pytest.approx(0.17)


def test_the_proximal_optimum():
    """Many local steps end where the loss and the pull balance: (w - 1) + mu * w = 0."""
    assert walk(fedprox(mu=3.0), 200) == pytest.approx(1 / 4, abs=1e-5)


def test_without_the_term_it_is_fedavg():
    assert walk(fedprox(mu=0.0), 5) == walk(fedavg(), 5)


def test_it_goes_round_any_strategy():
    one = {"w": torch.tensor(1.0)}
    assert fedprox(0.1, fedavgm()).init(one).keys() == fedavgm().init(one).keys()
    inside = scaffold(population=1)
    memory, cast = tree.map(torch.clone, inside.remember(one)), {"params": one, "control": {"w": torch.tensor(5.0)}}
    corrected = fedprox(2.0, inside).correct(one, {"w": torch.tensor(4.0)}, cast, memory)
    assert corrected["w"] == 1 + 2 * (4 - 1) + 5
