"""A clip that follows a quantile: where it goes, what one client can do to it, and the noise that pays for it."""

import math

import dp_accounting
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtailor import strategies, tree
from fedtailor.errors import ConfigError
from fedtailor.privacy import private
from fedtailor.privacy.adaptive import REACH, bit, count_noise, moved, values_noise
from fedtailor.privacy.site_accounting import site_epsilon
from fedtailor.strategy import Local, Strategy
from fedtailor.study import AdaptiveClip

QUIET = AdaptiveClip(quantile=0.5, lr=0.2, count_noise=1e-9)


def summand_of(strategy: Strategy, state: tree.Tree, end: torch.Tensor) -> tree.Tree:
    one, cast = torch.tensor(1.0), strategy.broadcast(state)
    return strategy.report(Local(cast, {}, {"w": state["params"]["w"] + end}, one, one, 0.1))[0]


def round_of(strategy: Strategy, state: tree.Tree, ends: list[torch.Tensor], round: int = 0) -> tree.Tree:
    acc = None
    for end in ends:
        acc = strategy.reduce.add(acc, tree.at(summand_of(strategy, state, end), None))
    assert acc is not None
    return strategy.apply(state, acc, round)


def test_one_round_by_hand():
    """Norms 0.5, 2 and 4, one of three within a clip of 1: it grows by exp(0.2 (1/2 - 1/3))."""
    strategy = private(strategies.fedavg(), clip=1.0, noise_multiplier=0.0, cohort=3, adaptive=QUIET)
    state = strategy.init({"w": torch.zeros(2)})
    after = round_of(strategy, state, [torch.tensor(v) for v in ([0.5, 0.0], [0.0, 2.0], [-4.0, 0.0])])
    assert float(after["clip"]) == pytest.approx(math.exp(0.2 / 6), rel=1e-6)
    torch.testing.assert_close(after["params"]["w"], torch.tensor([-0.5, 1.0]) / 3, rtol=1e-5, atol=1e-6)


def test_a_client_that_is_missing_counts_half():
    strategy = private(strategies.fedavg(), clip=1.0, noise_multiplier=0.0, cohort=4, adaptive=QUIET)
    after = round_of(strategy, strategy.init({"w": torch.zeros(1)}), [torch.tensor([3.0])])
    assert float(after["clip"]) == pytest.approx(math.exp(-0.2 * (-0.5 / 4)), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_summand_that_is_not_finite_counts_as_nothing(bad):
    strategy = private(strategies.fedavg(), clip=1.0, noise_multiplier=0.0, cohort=4, adaptive=QUIET)
    got = summand_of(strategy, strategy.init({"w": torch.zeros(2)}), torch.tensor([bad, 1.0]))
    assert got["delta"]["w"].tolist() == [0.0, 0.0] and got["within"] == 0 and got["weight"] == 1


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 1e6, width=32), st.floats(0.125, 1e3, width=32))
def test_one_client_reaches_no_further_than_the_clip_and_half_a_count(size, clip):
    strategy = private(strategies.fedavg(), clip=1.0, noise_multiplier=0.0, cohort=4, adaptive=QUIET)
    state = strategy.init({"w": torch.zeros(3)}) | {"clip": torch.tensor(clip)}
    got = summand_of(strategy, state, torch.tensor([size, -size, size / 3]))
    assert float(tree.norm(got["delta"])) <= float(state["clip"])
    assert float(got["within"]) == (
        0.5 if float(tree.norm({"w": torch.tensor([size, -size, size / 3])})) <= clip else -0.5
    )


@pytest.mark.parametrize("quantile", [0.5, 0.8])
@pytest.mark.parametrize("first", [100.0, 0.01], ids=["from 100 times too high", "from 100 times too low"])
def test_the_clip_finds_the_quantile_of_the_norms(first, quantile):
    rng = torch.Generator().manual_seed(3)
    norms = torch.randn(400, generator=rng).mul(0.5).exp()
    true = float(norms.quantile(quantile))
    adaptive = AdaptiveClip(quantile=quantile, lr=0.2)  # with a cohort of 400 the count's deviation is 20
    strategy = private(
        strategies.fedavg(), clip=first * true, noise_multiplier=1.0, cohort=400, adaptive=adaptive, seed=1
    )
    state = strategy.init({"w": torch.zeros(1)})
    ways = []
    for round in range(240):
        bits = torch.func.vmap(bit, in_dims=(0, None))(norms.double(), state["clip"])
        total = {"delta": {"w": torch.zeros(1).double()}, "weight": torch.tensor(400.0), "within": bits.sum().double()}
        state = strategy.apply(state, total, round)
        ways.append(float(state["clip"]))
    settled = torch.tensor(ways[180:]).log().mean().exp()
    assert float(settled) == pytest.approx(true, rel=0.1)
    assert (ways[0] < first * true) == (first > 1)  # the right way from the first step


def test_the_clip_stays_in_reach():
    far, one = torch.tensor(1e9), torch.tensor(2.0)
    assert float(moved(one, far, 1, 0.5, 0.2, 2.0)) == pytest.approx(2.0 / REACH)
    assert float(moved(one, -far, 1, 0.5, 0.2, 2.0)) == pytest.approx(2.0 * REACH)


def test_the_noise_on_values_and_count_is_what_is_accounted_for():
    """Theorem 1 of Andrew et al.: z = 1 and sigma_b = 0.6 leave 1.809 for the values, and not 1.0, 0.6 or 1.17."""
    n, rounds, clip = 20_000, 400, 3.0
    adaptive = AdaptiveClip(quantile=0.5, lr=0.1, count_noise=0.6)
    strategy = private(strategies.fedavg(), clip=clip, noise_multiplier=1.0, cohort=8, adaptive=adaptive, key=bytes(32))
    state = strategy.init({"w": torch.zeros(n)})
    total = {"delta": {"w": torch.zeros(n).double()}, "weight": torch.tensor(8.0), "within": torch.tensor(0.0).double()}
    values = strategy.apply(state, total, 0)["params"]["w"] * 8
    assert float(values.std()) == pytest.approx(clip * (1 - 1.2**-2) ** -0.5, rel=0.02)
    small = strategy.init({"w": torch.zeros(1)})
    few = total | {"delta": {"w": torch.zeros(1).double()}}
    after = torch.stack([strategy.apply(small, few, round)["clip"] for round in range(rounds)])
    count = -(after / clip).log() / 0.1 * 8
    assert float(count.std()) == pytest.approx(0.6, rel=0.15)
    assert abs(float(count.mean())) < 4 * 0.6 / math.sqrt(rounds)


@pytest.mark.parametrize("z,sigma", [(1.0, 0.6), (2.5, 5.0), (0.8, 20.0)])
def test_values_and_count_together_cost_the_whole(z, sigma):
    """By dp-accounting: the two Gaussian mechanisms, composed, are one of multiplier z."""
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL, 1e-4)
    both = [dp_accounting.GaussianDpEvent(values_noise(z, sigma)), dp_accounting.GaussianDpEvent(2 * sigma)]
    accountant.compose(dp_accounting.SelfComposedDpEvent(dp_accounting.ComposedDpEvent(both), 10))
    assert accountant.get_epsilon(1e-5) == pytest.approx(site_epsilon(z, 10, 1e-5), rel=2e-3)


def test_a_count_that_costs_more_than_the_whole_is_refused():
    with pytest.raises(ConfigError, match=r"adaptive.count_noise: 0.5 must be more than half"):
        values_noise(1.0, 0.5)
    with pytest.raises(ConfigError, match="count_noise"):
        private(strategies.fedavg(), clip=1.0, noise_multiplier=3.0, cohort=4, adaptive=AdaptiveClip(count_noise=1.0))


@pytest.mark.parametrize("z", [0.4, 3.0, 50.0])
@pytest.mark.parametrize("cohort", [1, 4, 1000])
def test_a_count_noise_that_nobody_names_costs_little(z, cohort):
    assert z < values_noise(z, count_noise(z, cohort)) <= 1.033 * z


def test_a_clip_that_adapts_and_noise_that_is_taken_back_exclude_each_other():
    with pytest.raises(ConfigError, match="cannot be taken back"):
        private(strategies.fedavg(), clip=1.0, noise_multiplier=1.0, cohort=4, adaptive=QUIET, mixture=(1.0, -0.5))
