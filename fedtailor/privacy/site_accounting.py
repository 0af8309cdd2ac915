"""What site-level privacy costs, and how much noise a promise needs.

Two runs are neighbours when one site's whole contribution, in every round, is in the one and is nothing in the other;
that the site takes part, and when, is public. The coordinator sees the summands as they are and is trusted to add the
noise: what is promised holds against everybody else, the other sites among them, who see the models that it casts. A
site that is asked in every round has no amplification by sampling; ``rate`` is for rounds whose sites are drawn by a
secret Poisson sample, which a plan cannot ask for and a simulated population does.
"""

import math

from fedtailor.errors import ConfigError
from fedtailor.privacy.accounting import Charge, calibrate, epsilon, gaussian
from fedtailor.privacy.adaptive import count_noise
from fedtailor.privacy.correlated import best_window, mixture, participations, sensitivity
from fedtailor.study import CorrelatedNoise, SitePrivacy


def site_epsilon(noise_multiplier: float, rounds: int, delta: float, rate: float = 1.0) -> float:
    """The epsilon of ``rounds`` Gaussian mechanisms, each on all clients or on a Poisson sample of rate ``rate``.

    Formal guarantee: that of :func:`fedtailor.privacy.accounting.epsilon`, for whole clients in the place of records.
    """
    if not rounds:
        return 0.0
    if rate == 1:
        return gaussian(noise_multiplier / math.sqrt(rounds), delta)
    return epsilon([Charge(noise_multiplier, rate, rounds)], delta)


def epsilon_after(privacy: SitePrivacy, rounds: int, rate: float = 1.0) -> float:
    """What the first ``rounds`` rounds of a plan cost each site; 0 before the first.

    Args:
        rate: of the secret Poisson sample that each round asks; 1 where everybody is asked, or in turns.

    Raises:
        ConfigError: if the noise is not filled in, or is too little to be accounted for.
    """
    if not rounds:
        return 0.0
    if privacy.noise_multiplier is None:
        raise ConfigError("privacy.noise_multiplier: null; the plan does not say how much noise to add")
    alike = privacy.noise_multiplier / _worse(privacy, rounds)
    return site_epsilon(alike, _turns(privacy, rounds), privacy.delta, rate)


def calibrated(privacy: SitePrivacy, rounds: int, cohort: int, rate: float = 1.0) -> SitePrivacy:
    """``privacy`` with the least noise, to 0.1 %, that keeps its promise over ``rounds`` rounds, and all else that it left open.

    Raises:
        ConfigError: if no noise does, or noise is to be taken back where rounds ask samples: nobody has a turn there.
    """
    if rate < 1 and privacy.correlated is not None:
        raise ConfigError(
            "privacy.correlated: is for sites that take turns, and here each round asks a sample; use null"
        )
    if privacy.correlated is not None and privacy.correlated.window is None:
        window = best_window(rounds, privacy.correlated.separation)
        privacy = privacy.model_copy(update={"correlated": privacy.correlated.model_copy(update={"window": window})})
    noise = privacy.noise_multiplier
    if noise is None and rate < 1:
        noise = calibrate(privacy.epsilon, privacy.delta, rate, rounds)
        privacy = privacy.model_copy(update={"noise_multiplier": noise})
    elif noise is None:
        noise = _least(privacy.epsilon, privacy.delta) * math.sqrt(_turns(privacy, rounds)) * _worse(privacy, rounds)
        noise = math.ceil(1e4 * noise) / 1e4  # up: less would break the promise
        if noise > 1e6:
            raise ConfigError(f"privacy.epsilon: {privacy.epsilon:g} is out of reach; allow a larger one")
        privacy = privacy.model_copy(update={"noise_multiplier": noise})
    if privacy.adaptive is not None and privacy.adaptive.count_noise is None:
        deviation = count_noise(noise, cohort)
        privacy = privacy.model_copy(
            update={"adaptive": privacy.adaptive.model_copy(update={"count_noise": deviation})}
        )
    return privacy


def _least(epsilon: float, delta: float) -> float:
    """The multiplier of one Gaussian mechanism that costs ``epsilon``, or up to 0.05 % more: PLDs are rounded upwards."""
    from dp_accounting.gaussian_mechanism import get_sigma_gaussian

    found = float(get_sigma_gaussian(epsilon, delta))
    while gaussian(found, delta) > epsilon:
        found *= 1.0005
    return found


def mixture_of(correlated: CorrelatedNoise | None) -> tuple[float, ...]:
    """The mixture that a plan asks for; independent noise where it asks for none."""
    if correlated is None:
        return (1.0,)
    if correlated.window is None:
        raise ConfigError("privacy.correlated.window: null; the plan does not say which rounds' noise to mix")
    return mixture(correlated.window)


def _turns(privacy: SitePrivacy, rounds: int) -> int:
    return rounds if privacy.correlated is None else participations(rounds, privacy.correlated.separation)


def _worse(privacy: SitePrivacy, rounds: int) -> float:
    """How much more one site can change than by as many rounds of independent noise: 1 where the noise is that."""
    if privacy.correlated is None:
        return 1.0
    separation = privacy.correlated.separation
    reach = sensitivity(mixture_of(privacy.correlated), rounds, separation)
    return reach / math.sqrt(participations(rounds, separation))
