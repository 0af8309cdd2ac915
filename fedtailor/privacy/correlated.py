"""Noise of which later rounds take back a part: for sites that take part in turn, without amplification by sampling.

A model is a sum of rounds, so what counts is the noise in sums of rounds. The noise of round t is a fixed mixture of the
draws of the last few rounds, ``d[0] z[t] + d[1] z[t-1] + ...``, with ``d`` from the series of the square root of 1 - x:
sums of it stay small, because most of a draw is taken back later. This is the matrix mechanism of Choquette-Choo et al.
2023 (https://arxiv.org/abs/2306.08153): with D the lower-triangular Toeplitz matrix of ``d`` and C its inverse, the
rounds' totals X leave as X + D Z, which is D (C X + Z): one Gaussian mechanism on C X, also where X depends on what left
before (Denisov et al. 2022, https://arxiv.org/abs/2202.08312). The coefficients are those of Kalinin et al. 2025,
Back to Square Roots, https://arxiv.org/abs/2505.12128.

Where every site takes part in every round this does not help: the best window is then 1, independent noise.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedtailor.errors import ConfigError

MOST_ROUNDS = 10_000  # that can be accounted for
MOST_WINDOW = 64  # draws that are in one round's noise, each as large as the model

Floats = NDArray[np.float64]


def mixture(window: int) -> tuple[float, ...]:
    """How much of the draws of the last ``window`` rounds is in one round's noise, this round's first.

    >>> mixture(3)
    (1.0, -0.5, -0.125)
    """
    found = [1.0]
    for i in range(1, window):
        found.append(found[-1] * (1 - 1.5 / i))
    return tuple(found)


def participations(rounds: int, separation: int) -> int:
    """The most rounds in which one site takes part."""
    return -(-rounds // separation)


def sensitivity(mix: Sequence[float], rounds: int, separation: int) -> float:
    """By how much one site can change C X in Frobenius norm, where each of its summands has an L2 norm of at most 1.

    The site takes part at least ``separation`` rounds apart, in any rounds. Where C's coefficients are neither negative
    nor increasing, the worst is to begin at once, to come back as soon as may be, and to say the same each time:
    Kalinin and Lampert 2024, https://arxiv.org/abs/2405.13763, Theorem 2.

    Raises:
        ConfigError: where C is not such a matrix, and so has no bound here, or is too large.
    """
    if not (1 <= rounds <= MOST_ROUNDS and 1 <= separation):
        raise ConfigError(
            f"rounds: {rounds}, {separation} apart: correlated noise is accounted for in 1 to {MOST_ROUNDS} rounds"
        )
    steps = _unmixed(mix, _pulses(rounds, rounds)) if mix[0] > 0 else np.array([-1.0])
    if not (np.isfinite(steps).all() and (steps >= -1e-12).all() and (np.diff(steps) <= 1e-12).all()):
        raise ConfigError(
            f"correlated: {list(mix)[:4]}… is noise for which no bound is known: the coefficients of its inverse must "
            "be neither negative nor increasing; use privacy.correlated.window"
        )
    return float(np.linalg.norm(_unmixed(mix, _pulses(rounds, separation))))


def error(mix: Sequence[float], rounds: int, separation: int) -> float:
    """The noise's deviation in the sums of all rounds up to each, root mean square over them, at a cost of multiplier 1.

    Independent noise is the mixture ``(1.0,)``.
    """
    padded = np.zeros(rounds)
    padded[: len(mix)] = mix[:rounds]
    variances = np.cumsum(np.cumsum(padded) ** 2)
    return sensitivity(mix, rounds, separation) * math.sqrt(float(variances.mean()))


@lru_cache(maxsize=64)
def best_window(rounds: int, separation: int) -> int:
    """The window with the least :func:`error`; of equals the smallest."""
    return min(
        range(1, min(rounds, MOST_WINDOW) + 1), key=lambda w: (round(error(mixture(w), rounds, separation), 9), w)
    )


def _unmixed(mix: Sequence[float], values: Floats) -> Floats:
    """C applied to a column: the recursion that undoes the mixture."""
    from scipy.signal import lfilter  # half a second, and only turns ask

    return np.asarray(lfilter([1.0], mix, values))


def _pulses(rounds: int, separation: int) -> Floats:
    found = np.zeros(rounds)
    found[::separation] = 1.0
    return found
