"""FedDyn by hand, and the optimum that FedAvg misses."""

import pytest
import torch
from drift import error_after

from fedtailor import tree
from fedtailor.strategies import fedavg, feddyn
from fedtailor.strategy import Local


@pytest.mark.parametrize(("population", "everybody"), [(4, 4), (None, 2)])
def test_one_round(population, everybody):
    """h_k - alpha d_k at the client; h - alpha / m sum d_k and mean(theta_k) - h / alpha on the server."""
    strategy = feddyn(alpha=0.5, population=population)
    state = strategy.init({"w": torch.tensor(10.0)}) | {"tilt": {"w": torch.tensor(2.0)}}
    memory, acc, kept = {"tilt": {"w": torch.tensor(3.0)}}, None, []
    for delta in (-1.0, -3.0):
        params = {"w": torch.tensor(10.0 + delta)}
        local = Local(strategy.broadcast(state), memory, params, torch.tensor(9.0), torch.tensor(5.0), 0.1)
        summand, new = strategy.report(local)
        kept.append(new["tilt"]["w"].item())
        acc = strategy.reduce.add(acc, tree.at(summand, None))
    state = strategy.apply(state, acc, 0)
    tilt = 2 + 0.5 * 4 / everybody
    assert kept == pytest.approx([3 + 0.5, 3 + 1.5])
    assert state["tilt"]["w"].item() == pytest.approx(tilt)
    assert state["params"]["w"].item() == pytest.approx(8 - tilt / 0.5)


def test_a_step_is_tilted_and_held():
    strategy, memory = feddyn(alpha=0.5), {"tilt": {"w": torch.tensor(2.0)}}
    grads, params, cast = {"w": torch.tensor(1.0)}, {"w": torch.tensor(7.0)}, {"params": {"w": torch.tensor(4.0)}}
    assert strategy.correct(grads, params, cast, memory)["w"] == 1 - 2 + 0.5 * (7 - 4)


@pytest.mark.parametrize(("strategy", "reaches"), [(feddyn(alpha=1.0), True), (fedavg(), False)])
def test_it_reaches_the_optimum_that_drift_hides(strategy, reaches):
    error = error_after(strategy, steps=50)
    assert error < 1e-3 if reaches else error > 0.05
