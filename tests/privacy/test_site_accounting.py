"""What a site-level promise costs, against dp-accounting itself, and how much noise it takes."""

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from fedtailor.errors import ConfigError
from fedtailor.privacy.site_accounting import calibrated, epsilon_after, mixture_of, site_epsilon
from fedtailor.study import CorrelatedNoise, SitePrivacy

DELTA = 1e-5
PLAIN = SitePrivacy(unit="site", epsilon=8.0, delta=DELTA, clip=1.0)


@pytest.mark.parametrize(
    "z,rounds,rate", [(4.0, 50, 1.0), (1.0, 1, 1.0), (5.0, 100, 1.0), (1.0, 100, 0.1), (0.7, 30, 0.02)]
)
def test_it_equals_dp_accounting(z, rounds, rate):
    """Every client in every round, and a Poisson sample of them."""
    event = dp_accounting.GaussianDpEvent(z)
    if rate < 1:
        event = dp_accounting.PoissonSampledDpEvent(rate, event)
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL, 1e-3)
    accountant.compose(dp_accounting.SelfComposedDpEvent(event, rounds))
    assert site_epsilon(z, rounds, DELTA, rate) == pytest.approx(accountant.get_epsilon(DELTA), abs=1e-6)


@pytest.mark.parametrize("z,rounds,expected", [(1.0, 50, 54.4), (4.0, 50, 8.6), (5.0, 100, 10.0)])
def test_reference_figures(z, rounds, expected):
    assert site_epsilon(z, rounds, DELTA) == pytest.approx(expected, abs=0.06)


def test_taking_part_in_every_round_is_not_amplified_and_no_round_costs_nothing():
    assert site_epsilon(1.0, 10, DELTA) > 10 * site_epsilon(1.0, 10, DELTA, 0.02)
    assert site_epsilon(1.0, 0, DELTA) == epsilon_after(PLAIN, 0) == 0.0


@pytest.mark.parametrize(
    "more", [{}, {"adaptive": {}}, {"correlated": {"separation": 3}}, {"correlated": {"separation": 3, "window": 2}}]
)
@pytest.mark.parametrize("target,rounds", [(1.0, 10), (8.0, 100), (30.0, 7)])
def test_the_noise_keeps_the_promise_and_little_less_would_not(more, target, rounds):
    found = calibrated(SitePrivacy(unit="site", epsilon=target, delta=DELTA, clip=1.0, **more), rounds, 12)
    assert found.noise_multiplier is not None
    assert epsilon_after(found, rounds) <= target
    less = found.model_copy(update={"noise_multiplier": found.noise_multiplier * 0.997})
    assert epsilon_after(less, rounds) > target
    assert calibrated(found, rounds, 12) == found
    assert found.adaptive is None or found.adaptive.count_noise
    assert found.correlated is None or found.correlated.window


def test_a_noise_multiplier_that_is_named_is_kept():
    named = PLAIN.model_copy(update={"noise_multiplier": 2.5})
    assert calibrated(named, 10, 4) == named


def test_what_is_left_open_cannot_be_accounted_for():
    with pytest.raises(ConfigError, match="privacy.noise_multiplier: null"):
        epsilon_after(PLAIN, 3)
    with pytest.raises(ConfigError, match="privacy.correlated.window: null"):
        mixture_of(CorrelatedNoise(separation=2))
    with pytest.raises(ConfigError, match="^noise_multiplier: "):
        epsilon_after(PLAIN.model_copy(update={"noise_multiplier": 1e-9}), 3)
