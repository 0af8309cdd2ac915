"""Accounting: against dp-accounting itself, against published figures, and always on the safe side."""

import math
import time

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtailor.errors import ConfigError
from fedtailor.privacy.accounting import Cap, Charge, affordable, allowed, calibrate, epsilon

DELTA = 1e-5


def directly(charges, interval=1e-3, relation=dp_accounting.NeighboringRelation.REPLACE_SPECIAL):
    accountant = PLDAccountant(relation, interval)
    for c in charges:
        event = dp_accounting.PoissonSampledDpEvent(c.rate, dp_accounting.GaussianDpEvent(c.noise_multiplier))
        accountant.compose(dp_accounting.SelfComposedDpEvent(event, c.steps))
    return accountant.get_epsilon(DELTA)


@pytest.mark.parametrize(
    "z,ten,fifty,hundred", [(1.0, 3.00, 6.59, 9.67), (1.5, 1.44, 3.33, 4.88), (2, 0.96, 2.24, 3.28)]
)
def test_reference_figures(z, ten, fifty, hundred):
    for rounds, expected in ((10, ten), (50, fifty), (100, hundred)):
        assert epsilon([Charge(z, 0.032, 20)] * rounds, DELTA) == pytest.approx(expected, abs=0.006)


def test_it_equals_dp_accounting():
    mixed = [Charge(1.0, 0.032, 20), Charge(1.3, 0.1, 7), Charge(1.0, 0.032, 20), Charge(5.0, 1.0, 3)]
    assert epsilon(mixed, DELTA) == pytest.approx(directly(mixed), abs=1e-6)
    assert epsilon(mixed, DELTA) == epsilon(mixed[::-1], DELTA)
    fine = directly([Charge(1.0, 0.032, 200)], interval=1e-4)
    assert fine <= epsilon([Charge(1.0, 0.032, 200)], DELTA) <= fine + 1e-3  # coarse rounding is pessimistic


def test_a_full_batch_is_the_analytic_gaussian():
    """Balle and Wang 2018, https://arxiv.org/abs/1805.06530: one step at rate 1 has a closed form."""

    def phi(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    e = epsilon([Charge(4.0, 1.0, 4)], DELTA)  # four steps of z = 4 are one of z = 2
    assert phi(0.25 - 2 * e) - math.exp(e) * phi(-0.25 - 2 * e) == pytest.approx(DELTA, rel=0.01)


def test_zero_out_and_add_or_remove_cost_the_same():
    charges = [Charge(1.0, 0.05, 100)]
    other = directly(charges, relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    assert epsilon(charges, DELTA) == pytest.approx(other, abs=1e-6)


def test_thousands_of_rounds_are_cheap_and_hostile_ones_do_not_exhaust_memory():
    began = time.monotonic()
    assert epsilon([Charge(3.0, 0.01, 5)] * 5000, DELTA) == epsilon([Charge(3.0, 0.01, 25_000)], DELTA)
    assert 200 < epsilon([Charge(0.4, 1.0, 10**9)], DELTA)
    assert epsilon([Charge(0.4, 0.5, 2000)], DELTA) > 200
    assert time.monotonic() - began < 5


def test_nothing_spent_is_zero_and_an_unreachable_delta_is_never_allowed():
    assert epsilon([], DELTA) == 0.0
    assert not allowed(math.inf, Cap(1e6, DELTA)) and not allowed(math.nan, Cap(1e6, DELTA))


@settings(max_examples=3, deadline=None)
@given(st.floats(0.2, 12), st.sampled_from([1e-6, 1e-4]), st.floats(0.005, 0.5), st.integers(1, 1000))
def test_calibration_never_exceeds_and_is_tight(target, delta, rate, steps):
    z = calibrate(target, delta, rate, steps)
    assert epsilon([Charge(z, rate, steps)], delta) <= target
    if z > 0.4011:
        assert epsilon([Charge(round(z - 0.001, 3), rate, steps)], delta) > target


def test_a_plan_calibrated_for_its_rounds_affords_exactly_these():
    z = calibrate(3.0, DELTA, 0.032, 200)
    assert z == pytest.approx(1.0, abs=0.002)
    charge = Charge(z, 0.032, 20)
    assert affordable([], charge, 3.0, DELTA) == 10
    assert affordable([charge] * 4, charge, 3.0, DELTA) == 6
    assert affordable([charge] * 20, charge, 3.0, DELTA) == 0


@pytest.mark.parametrize("z,rate,steps,name", [(0.39, 0.1, 1, "noise_multiplier"), (math.nan, 0.1, 1, "noise_multiplier"),
                                               (1.0, 0.0, 1, "rate"), (1.0, 1.1, 1, "rate"), (1.0, math.nan, 1, "rate"),
                                               (1.0, 0.1, 0, "steps"), (1.0, 0.1, True, "steps")])  # fmt: skip
def test_nonsense_is_refused_by_name(z, rate, steps, name):
    with pytest.raises(ConfigError, match=f"^{name}: "):
        Charge(z, rate, steps)


def test_impossible_targets_and_caps_are_refused():
    with pytest.raises(ConfigError, match="out of reach"):
        calibrate(1e-3, 1e-9, 1.0, 100_000)
    with pytest.raises(ConfigError, match="^delta: "):
        Cap(1.0, 0.5)
