"""What record-level training costs: privacy loss distributions of the Poisson-sampled Gaussian, composed.

Two data sets are neighbours when one record of the one is replaced by a record that contributes nothing (zero-out;
dp-accounting's ``REPLACE_SPECIAL``). The number of a site's records is public: it weights the site's update and fixes
the expected batch size, and add-or-remove neighbours, which differ in it, would make that number itself a secret. For
the Poisson-sampled Gaussian both relations have the same privacy loss, so the figures compare with Opacus'.

No amplification is claimed for the choice of sites: the coordinator knows who takes part.
Doroshenko et al. 2022, Connect the Dots, https://arxiv.org/abs/2207.04380.

dp-accounting is imported where a figure is computed: it costs a second, and most processes never ask.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fedtailor.errors import ConfigError

INTERVAL = 1e-3  # of the discretised privacy loss; rounding is pessimistic, and costs about 1e-4 of epsilon
MIN_NOISE = 0.4  # below, the distributions need gigabytes: a coordinator could exhaust a site's memory
MOST_ROUNDS = 100_000  # where counting affordable rounds stops
_LOOSE = 200.0  # above this Renyi bound an exact figure has no use and would cost memory
_ORDERS = [*range(2, 33), 40, 48, 64, 96, 128, 256, 512, 1024]


def _number(name: str, value: float, low: float, high: float, way_out: str) -> None:
    if not low <= value <= high:  # a NaN fails too
        raise ConfigError(f"{name}: {value} is not from {low:g} to {high:g}; {way_out}")


@dataclass(frozen=True, order=True)
class Charge:
    """What one piece of work costs: ``steps`` Gaussian mechanisms, each on a Poisson sample of public rate ``rate``."""

    noise_multiplier: float
    rate: float
    steps: int

    def __post_init__(self) -> None:
        _number("noise_multiplier", self.noise_multiplier, MIN_NOISE, 1e6, f"use at least {MIN_NOISE}")
        _number("rate", self.rate, 1e-12, 1, "use the share of records that a step sees on average")
        if type(self.steps) is not int or not 1 <= self.steps <= 10**9:
            raise ConfigError(f"steps: {self.steps!r} is not a whole number from 1 to 1e9")


@dataclass(frozen=True)
class Cap:
    """The most privacy loss a site allows one data set over its whole life."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        _number("epsilon", self.epsilon, 1e-6, 1e6, "10 is already a weak promise")
        _number("delta", self.delta, 1e-15, 0.1, "use less than one over the number of records")


def epsilon(charges: Sequence[Charge], delta: float) -> float:
    """The epsilon of all ``charges`` together at ``delta``; ``math.inf`` where delta cannot be reached.

    Formal guarantee: an upper bound for adaptively composed work, by privacy loss distributions with pessimistic
    rounding, and above about 200 by Renyi divergences. Equal mechanisms are grouped, so thousands of rounds are cheap.
    """
    _number("delta", delta, 1e-15, 0.1, "use less than one over the number of records")
    steps: Counter[tuple[float, float]] = Counter()
    for charge in charges:
        steps[charge.noise_multiplier, charge.rate] += charge.steps
    return _epsilon(tuple(sorted((z, rate, n) for (z, rate), n in steps.items())), delta)


def gaussian(noise_multiplier: float, delta: float) -> float:
    """The epsilon of one Gaussian mechanism without sampling; of n equal ones, at their multiplier over the root of n."""
    _number("noise_multiplier", noise_multiplier, 1e-9, 1e9, "use more noise")
    _number("delta", delta, 1e-15, 0.1, "use less than one over the number of records")
    return _epsilon(((noise_multiplier, 1.0, 1),), delta)


@lru_cache(maxsize=4096)
def _epsilon(groups: tuple[tuple[float, float, int], ...], delta: float) -> float:
    if not groups:
        return 0.0
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    renyi = RdpAccountant(_ORDERS, dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    for z, rate, n in groups:
        event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(z))
        renyi.compose(dp_accounting.SelfComposedDpEvent(event, n))
    if (bound := float(renyi.get_epsilon(delta))) > _LOOSE:
        return bound
    total = None
    for z, rate, n in groups:
        part = _step(z, rate).self_compose(n)
        total = part if total is None else total.compose(part)
    return float(total.get_epsilon_for_delta(delta)) if total is not None else 0.0


@lru_cache(maxsize=64)
def _step(z: float, rate: float) -> Any:
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(
        z,
        value_discretization_interval=INTERVAL,
        sampling_prob=rate,
        neighboring_relation=NeighboringRelation.REPLACE_SPECIAL,
    )


def _last(fits: Callable[[int], bool], most: int) -> int:
    """The greatest n from 0 to ``most`` for which ``fits``, where fitting n implies fitting less."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@lru_cache(maxsize=256)
def calibrate(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """The least noise multiplier, to 1e-3, for which ``steps`` steps in all cost at most ``epsilon``; never more.

    Raises:
        ConfigError: if no multiplier up to 1000 suffices.
    """
    Cap(epsilon, delta)

    def too_little(thousandths: int) -> bool:
        z = thousandths / 1000
        return z < MIN_NOISE or _epsilon(((z, rate, steps),), delta) > epsilon

    least = Charge(MIN_NOISE, rate, steps)
    if _epsilon(((least.noise_multiplier, rate, steps),), delta) <= epsilon:
        return MIN_NOISE
    found = _last(too_little, 1_000_000) + 1
    if found > 1_000_000:
        raise ConfigError(
            f"epsilon: {epsilon:g} at delta {delta:g} is out of reach for {steps} steps at rate {rate:g}; "
            "train fewer steps, at a lower rate, or allow a larger epsilon"
        )
    return found / 1000


def affordable(spent: Sequence[Charge], charge: Charge, cap_epsilon: float, delta: float) -> int:
    """How many more times ``charge`` fits under ``cap_epsilon`` on top of ``spent``; counting stops at 100 000."""

    def fits(n: int) -> bool:
        many = Charge(charge.noise_multiplier, charge.rate, charge.steps * n)
        return epsilon([*spent, many], delta) <= cap_epsilon

    return _last(fits, min(MOST_ROUNDS, 10**9 // charge.steps))


def allowed(value: float, cap: Cap) -> bool:
    """Whether a total epsilon is within the cap; infinite and undefined ones are not."""
    return math.isfinite(value) and value <= cap.epsilon
