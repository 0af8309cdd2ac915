"""Noise that later rounds take back: its coefficients, its covariance, what one site can do to it, and what it is worth."""

import itertools
import math

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant

from fedtailor import strategies
from fedtailor.errors import ConfigError
from fedtailor.privacy import private
from fedtailor.privacy.correlated import best_window, error, mixture, participations, sensitivity
from fedtailor.privacy.site_accounting import calibrated, epsilon_after
from fedtailor.study import SitePrivacy


def toeplitz(mix, rounds):
    return sum(np.diag(np.full(rounds - i, d), -i) for i, d in enumerate(mix[:rounds]))


def noise_of(mix, rounds, size, key=bytes(32), z=1.0):
    """The noise of each round, as a private strategy adds it: ``[rounds, size]``."""
    strategy = private(strategies.fedavg(), clip=1.0, noise_multiplier=z, cohort=1, mixture=mix, key=key)
    state = strategy.init({"w": torch.zeros(size).double()})
    total = {"delta": {"w": torch.zeros(size).double()}, "weight": torch.tensor(1.0)}
    return torch.stack([strategy.apply(state, total, round)["params"]["w"] for round in range(rounds)]).numpy()


def test_the_mixture_is_the_square_root_of_taking_differences():
    whole = toeplitz(mixture(12), 12)
    np.testing.assert_allclose(whole @ whole, toeplitz((1.0, -1.0), 12), atol=1e-12)
    assert mixture(1) == (1.0,)


def test_the_covariance_of_the_noise_is_that_of_the_inverse():
    """Monte Carlo: the rounds' noise has covariance C^-1 C^-T."""
    mix, rounds, size = mixture(3), 6, 40_000
    drawn = noise_of(mix, rounds, size)
    inverse = np.linalg.inv(np.linalg.inv(toeplitz(mix, rounds)))
    np.testing.assert_allclose(drawn @ drawn.T / size, inverse @ inverse.T, atol=5 / math.sqrt(size))


def test_a_round_has_the_same_noise_again_and_another_key_has_none_of_it():
    once, again, other = (
        noise_of(mixture(3), 5, 1000),
        noise_of(mixture(3), 5, 1000),
        noise_of(mixture(3), 5, 1000, b"k" * 32),
    )
    assert (once == again).all()
    assert abs(np.corrcoef(once[4], other[4])[0, 1]) < 0.15


def patterns(rounds, separation):
    """Every set of rounds in which one site may take part."""
    for size in range(1, rounds + 1):
        for found in itertools.combinations(range(rounds), size):
            if all(b - a >= separation for a, b in itertools.pairwise(found)):
                yield found


@pytest.mark.parametrize(
    "rounds,separation,window", [(7, 1, 2), (8, 2, 2), (8, 2, 4), (9, 3, 3), (9, 3, 9), (6, 6, 3), (5, 9, 2)]
)
def test_sensitivity_by_brute_force(rounds, separation, window):
    """Over all patterns, all signs, and random directions in three dimensions."""
    c, rng, worst = np.linalg.inv(toeplitz(mixture(window), rounds)), np.random.default_rng(0), 0.0
    for pattern in patterns(rounds, separation):
        for signs in itertools.product([1, -1], repeat=len(pattern)):
            worst = max(worst, float(np.linalg.norm(c[:, list(pattern)] @ np.array(signs))))
        turned = rng.normal(size=(len(pattern), 3))
        turned /= np.linalg.norm(turned, axis=1, keepdims=True)
        assert np.linalg.norm(c[:, list(pattern)] @ turned) <= sensitivity(mixture(window), rounds, separation) + 1e-9
    assert sensitivity(mixture(window), rounds, separation) == pytest.approx(worst, rel=1e-9)


def test_independent_noise_is_the_mixture_of_one():
    assert sensitivity((1.0,), 100, 1) == pytest.approx(10.0)
    assert sensitivity((1.0,), 100, 7) == pytest.approx(math.sqrt(participations(100, 7)))


@pytest.mark.parametrize("mix", [(1.0, 0.5), (1.0, -1.5), (1.0, 0.0, -0.9), (0.0, 1.0)])
def test_noise_without_a_bound_is_refused(mix):
    with pytest.raises(ConfigError, match="no bound is known"), np.errstate(all="ignore"):
        sensitivity(mix, 20, 2)


def test_more_rounds_than_can_be_accounted_for_are_refused():
    with pytest.raises(ConfigError, match="rounds: 1000000000"):
        sensitivity(mixture(2), 10**9, 2)


@pytest.mark.parametrize("separation,most", [(2, 0.77), (10, 0.45), (100, 0.33)])
def test_sums_of_100_rounds_have_less_noise_at_equal_cost_where_sites_take_turns(separation, most):
    independent = error((1.0,), 100, separation)
    assert independent == pytest.approx(math.sqrt(participations(100, separation) * 101 / 2))
    assert error(mixture(best_window(100, separation)), 100, separation) < most * independent


@pytest.mark.parametrize("separation,times", [(2, 1.08), (10, 1.41)])
def test_asking_all_sites_in_every_round_is_better_still_where_it_can_be_done(separation, times):
    """A round of sites in turn has fewer to divide by; the figures of docs/sharp_edges/site_level.md."""
    turns = error(mixture(best_window(100, separation)), 100, separation) * separation
    assert turns / error((1.0,), 100, 1) == pytest.approx(times, abs=0.01)


def test_where_every_site_takes_part_in_every_round_it_does_not_help():
    """So such a plan is refused: the least error of 100 rounds is that of independent noise."""
    assert best_window(100, 1) == 1
    assert all(error(mixture(w), 100, 1) > error((1.0,), 100, 1) for w in range(2, 65))


def test_a_model_of_100_rounds_has_less_noise_at_equal_epsilon():
    """The same by Monte Carlo, through the plan's own calibration and the noise that is really added."""
    plain = SitePrivacy(unit="site", epsilon=8.0, delta=1e-5, clip=1.0)
    turns = SitePrivacy(unit="site", epsilon=8.0, delta=1e-5, clip=1.0, correlated={"separation": 10})
    one, other = calibrated(turns, 100, 1), calibrated(plain, participations(100, 10), 1)  # both: ten turns a site
    assert other.noise_multiplier is not None and one.noise_multiplier is not None and one.correlated is not None
    for found, rounds in ((one, 100), (other, 10)):
        assert 7.99 < epsilon_after(found, rounds) <= 8.0
    sums = noise_of(mixture(one.correlated.window), 100, 200, z=one.noise_multiplier).cumsum(0)
    independent = noise_of((1.0,), 100, 200, z=other.noise_multiplier).cumsum(0)
    expected = error(mixture(one.correlated.window), 100, 10) / error((1.0,), 100, 10)
    assert expected < 0.45
    assert sums.std() / independent.std() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("rounds", [1, 9, 100])
def test_the_whole_run_is_one_gaussian_mechanism(rounds):
    """Epsilon by dp-accounting, of one Gaussian whose multiplier is z over the sensitivity of C."""
    privacy = SitePrivacy(unit="site", epsilon=8.0, delta=1e-5, clip=1.0, noise_multiplier=3.0,
                          correlated={"separation": 4, "window": 4})  # fmt: skip
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL, 1e-4)
    accountant.compose(dp_accounting.GaussianDpEvent(3.0 / sensitivity(mixture(4), rounds, 4)))
    assert epsilon_after(privacy, rounds) == pytest.approx(accountant.get_epsilon(1e-5), rel=2e-3)
