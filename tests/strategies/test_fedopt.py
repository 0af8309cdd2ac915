"""The adaptive server optimisers: by hand, and side by side with Flower's."""

import math

import pytest
import torch
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedYogi
from pydantic import ValidationError

from fedtailor import tree
from fedtailor.strategies import fedadagrad, fedadam, fedyogi

TAU = 0.01
SECOND = {
    fedadam: lambda v, d: 0.9 * v + 0.1 * d * d,
    fedyogi: lambda v, d: v - 0.1 * d * d * math.copysign(1, v - d * d),
    fedadagrad: lambda v, d: v + d * d,
}
DECAYS = {fedadam: {"beta2": 0.9}, fedyogi: {"beta2": 0.9}, fedadagrad: {}}


@pytest.mark.parametrize("factory", SECOND)
def test_three_rounds(factory):
    """Algorithm 2 of Reddi et al. in plain Python: v starts at tau^2."""
    strategy, weight = factory(lr=0.1, beta1=0.5, tau=TAU, **DECAYS[factory]), 4.0
    state, w, m, v = strategy.init({"w": torch.tensor([1.0])}), 1.0, 0.0, TAU**2
    for round, delta in enumerate([1.0, -0.5, 0.25]):
        total = {"delta": {"w": torch.tensor([delta * weight]).double()}, "weight": torch.tensor(weight).double()}
        state = strategy.apply(state, total, round)
        m, v = 0.5 * m + 0.5 * delta, SECOND[factory](v, delta)
        w += 0.1 * m / (math.sqrt(v) + TAU)
        assert state["params"]["w"].item() == pytest.approx(w, abs=1e-6)


def test_the_first_step_is_as_long_as_lr_whatever_the_scale():
    """With beta1 = 0 a constant change much larger than tau moves every coordinate by lr / sqrt(1 - beta2)."""
    strategy = fedadam(lr=0.1, beta1=0.0, beta2=0.99, tau=1e-8)
    state = strategy.init({"w": torch.zeros(2)})
    total = {"delta": {"w": torch.tensor([3.0, -300.0]).double()}, "weight": torch.tensor(1.0).double()}
    torch.testing.assert_close(strategy.apply(state, total, 0)["params"]["w"], torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda round: fedadagrad(lr=0.1, tau=TAU), FedAdagrad(eta=0.1, tau=TAU)),
        (lambda round: fedyogi(lr=0.1, beta2=0.9, tau=TAU), FedYogi(eta=0.1, beta_2=0.9, tau=TAU)),
        (
            # Flower corrects the bias, which Algorithm 2 does not, with an exponent one too high: Kingma and Ba correct
            # by beta^t in step t = 1, 2, ...; Flower by beta^(t + 1). Its rate of each round, given to ours, agrees.
            lambda round: fedadam(
                0.1 * math.sqrt(1 - 0.9 ** (round + 1)) / (1 - 0.9 ** (round + 1)), beta2=0.9, tau=TAU
            ),
            FedAdam(eta=0.1, beta_2=0.9, tau=TAU),
        ),
    ],
    ids=["fedadagrad", "fedyogi", "fedadam"],
)
def test_flower_agrees_for_five_rounds(ours, theirs, step, flower, start, around):
    """From the same second moment, that is: Flower starts at 0, and the paper asks for at least tau^2."""
    state, params = ours(1).init(start), start
    state["v"] = tree.map(torch.zeros_like, state["v"])
    for round in range(1, 6):
        replies = around(params, 4, round, rows=[3.0, 10.0, 40.0, 7.0])
        state, params = step(ours(round), state, replies), flower(theirs, params, replies, round)
        torch.testing.assert_close(state["params"], params, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["beta1", "beta2"])
def test_a_decay_of_one_never_forgets_and_is_refused(name):
    with pytest.raises(ValidationError, match=name):
        fedadam(**{name: 1.0})
