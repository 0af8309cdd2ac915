"""FedAdam by hand: Algorithm 2 of Reddi et al. in plain Python."""

import math

import pytest
import torch
from pydantic import ValidationError

from fedtailor.strategies import fedopt

ARGS = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "tau": 0.01}


def adam(deltas, lr, beta1, beta2, tau):
    w, m, v = 1.0, 0.0, tau**2
    for delta in deltas:
        m = beta1 * m + (1 - beta1) * delta
        v = beta2 * v + (1 - beta2) * delta**2
        w += lr * m / (math.sqrt(v) + tau)
    return w


def test_three_rounds():
    strategy, deltas, weight = fedopt(**ARGS), [1.0, -0.5, 0.25], 4.0
    state = strategy.init({"w": torch.tensor([1.0])})
    for round, delta in enumerate(deltas):
        total = {"delta": {"w": torch.tensor([delta * weight]).double()}, "weight": torch.tensor(weight).double()}
        state = strategy.apply(state, total, round)
    assert state["params"]["w"].item() == pytest.approx(adam(deltas, **ARGS), abs=1e-6)


def test_the_first_step_is_as_long_as_lr_whatever_the_scale():
    """With beta1 = 0 a constant change much larger than tau moves every coordinate by lr / sqrt(1 - beta2)."""
    strategy = fedopt(lr=0.1, beta1=0.0, beta2=0.99, tau=1e-8)
    state = strategy.init({"w": torch.zeros(2)})
    total = {"delta": {"w": torch.tensor([3.0, -300.0]).double()}, "weight": torch.tensor(1.0).double()}
    torch.testing.assert_close(strategy.apply(state, total, 0)["params"]["w"], torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("name", ["beta1", "beta2"])
def test_a_decay_of_one_never_forgets_and_is_refused(name):
    with pytest.raises(ValidationError, match=name):
        fedopt(**{name: 1.0})
