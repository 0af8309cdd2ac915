"""Site-level privacy: one site's reach, the noise it gets, and strategies that cannot have it."""

import math

import pytest
import torch

from fedtailor import strategies, tree
from fedtailor.errors import ConfigError
from fedtailor.privacy import private
from fedtailor.strategy import Local

ARGS = {"clip": 1.0, "noise_multiplier": 0.5, "cohort": 4}
START = {"params": {"w": torch.zeros(100, 100), "b": torch.zeros(3)}}


def summand(strategy, value, examples=7.0):
    end = {"w": torch.full((100, 100), value), "b": torch.zeros(3)}
    return strategy.report(Local(START, {}, end, torch.tensor(examples), torch.tensor(5.0), 0.1))[0]


@pytest.mark.parametrize("value", [0.0, 1e-4, 1e6, math.nan, math.inf])
def test_one_site_moves_the_sum_by_at_most_the_clip(value):
    got = summand(private(strategies.fedavg(), **ARGS), value)
    assert tree.norm(got["delta"]) <= 1 + 1e-6 and got["weight"] == 1


def test_the_weight_and_the_divisor_are_public():
    strategy = private(strategies.fedavg(), **ARGS | {"noise_multiplier": 0.0})
    a, b = summand(strategy, 1e-4, examples=7.0), summand(strategy, 1e-4, examples=7000.0)
    assert torch.equal(a["delta"]["w"], b["delta"]["w"])
    state = strategy.apply(strategy.init(START["params"]), tree.map(torch.Tensor.double, a), 0)
    torch.testing.assert_close(state["params"]["w"], a["delta"]["w"] / 4)


@pytest.mark.parametrize("key", [None, bytes(32)])
def test_noise_has_its_deviation_and_each_round_its_own(key):
    strategy = private(strategies.fedavg(), **ARGS, seed=1, key=key)
    total = tree.map(torch.Tensor.double, summand(strategy, 0.0))
    noise = [strategy.apply(strategy.init(START["params"]), total, r)["params"]["w"] * 4 for r in (0, 1, 0)]
    assert abs(noise[0].std() / 0.5 - 1) < 5 / math.sqrt(2e4)
    assert torch.equal(noise[0], noise[2])
    assert abs(torch.corrcoef(torch.stack([noise[0].flatten(), noise[1].flatten()]))[0, 1]) < 0.06


def test_a_median_cannot_be_made_private():
    with pytest.raises(ConfigError, match="only a strategy that sums"):
        private(strategies.median(), **ARGS)
