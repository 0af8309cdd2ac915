"""FedNova by hand, and the objective that FedAvg misses."""

import pytest
import torch

from fedtailor import tree
from fedtailor.simulations.engine import simulate_round, vmapped
from fedtailor.strategies import fedavg, fednova
from fedtailor.strategy import Local
from fedtailor.training import local_train


def end(strategy, *clients):
    """Clients ``(rows, steps, delta)`` that start at w = 0; where the server ends."""
    state, acc = strategy.init({"w": torch.tensor(0.0)}), None
    for rows, steps, delta in clients:
        count, taken = torch.tensor(float(rows)), torch.tensor(float(steps))
        local = Local(strategy.broadcast(state), {}, {"w": torch.tensor(delta)}, count, taken, 0.1)
        acc = strategy.reduce.add(acc, tree.at(strategy.report(local)[0], None))
    return strategy.apply(state, acc, 0)["params"]["w"].item()


def test_steps_are_normalised_and_then_taken_at_once():
    # shares 1/4 and 3/4: mean change per step 1/4 * 1/1 + 3/4 * 8/4, times mean steps 1/4 * 1 + 3/4 * 4
    assert end(fednova(), (1, 1, 1.0), (3, 4, 8.0)) == pytest.approx(1.75 * 3.25)
    assert end(fednova(server_lr=0.5), (1, 1, 1.0), (3, 4, 8.0)) == pytest.approx(1.75 * 3.25 / 2)


def test_equal_steps_make_it_fedavg():
    clients = [(1, 3, 1.0), (3, 3, 8.0)]
    assert end(fednova(), *clients) == pytest.approx(end(fedavg(), *clients))


@pytest.mark.parametrize(("strategy", "optimum"), [(fednova(), 0.5), (fedavg(), 0.9)])
def test_the_one_that_steps_more_does_not_win(strategy, optimum):
    """Optima 0 and 1, equal rows, 1 and 10 steps: the joint optimum is 1/2; FedAvg is drawn to the one that steps more."""
    train = local_train(lambda params, batch: {"w": params["w"] - batch["target"]}, strategy, lr=0.002)
    state = strategy.init({"w": torch.tensor(0.0)})
    live = (torch.arange(10) < torch.tensor([[1], [10]])).float()
    batches = {"target": torch.tensor([[0.0] * 10, [1.0] * 10])}
    for round in range(700):
        state, _ = simulate_round(strategy, vmapped(train), state, {}, batches, live, torch.ones(2), round)
    assert state["params"]["w"].item() == pytest.approx(optimum, abs=0.02)
