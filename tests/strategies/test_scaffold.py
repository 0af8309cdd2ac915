"""SCAFFOLD by hand, and the optimum that FedAvg misses."""

import pytest
import torch
from drift import error_after

from fedtailor import tree
from fedtailor.strategies import fedavg, scaffold
from fedtailor.strategy import Local

START = {"w": torch.tensor([10.0])}


def test_one_round_option_ii():
    """c_i+ = c_i - c + (x - y_i) / (K lr); the server adds 1/N of the changes, N being everybody."""
    strategy = scaffold(population=4)
    state = strategy.init(START) | {"control": {"w": torch.tensor([2.0])}}
    memory, acc = {"control": {"w": torch.tensor([3.0])}}, None
    kept = []
    for delta in (-1.0, -3.0):  # two of the four take part: 5 steps of lr 0.1
        params = {"w": START["w"] + delta}
        local = Local(strategy.broadcast(state), memory, params, torch.tensor(9.0), torch.tensor(5.0), 0.1)
        summand, new = strategy.report(local)
        kept.append(new["control"]["w"].item())
        acc = strategy.reduce.add(acc, tree.at(summand, None))
    state = strategy.apply(state, acc, 0)
    assert kept == pytest.approx([3 - 2 + 1 / 0.5, 3 - 2 + 3 / 0.5])
    assert state["params"]["w"].item() == pytest.approx(10 - 2)
    assert state["control"]["w"].item() == pytest.approx(2 + ((-2 + 2) + (-2 + 6)) / 4)


def test_a_step_is_corrected_by_c_minus_ci():
    strategy = scaffold(population=1)
    corrected = strategy.correct(
        {"w": torch.tensor(1.0)}, {}, {"control": {"w": torch.tensor(5.0)}}, {"control": {"w": torch.tensor(2.0)}}
    )
    assert corrected["w"] == 1 + 5 - 2


@pytest.mark.parametrize(("strategy", "reaches"), [(scaffold(population=2), True), (fedavg(), False)])
def test_it_reaches_the_optimum_that_drift_hides(strategy, reaches):
    error = error_after(strategy, steps=10)
    assert error < 1e-3 if reaches else error > 0.05
