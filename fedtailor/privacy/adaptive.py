"""A clip that follows a quantile of the clients' norms. Andrew et al. 2021, https://arxiv.org/abs/1905.03871.

Each client says in one bit whether its summand is within the clip. The coordinator noises the bits' sum and moves the
clip: down where more clients than the quantile are within it, up where fewer are.
"""

import math

import torch
from torch import Tensor

from fedtailor.errors import ConfigError

REACH = 1000.0  # the clip stays from 1/1000 of where it began to 1000 times that


def bit(norm: Tensor, clip: Tensor) -> Tensor:
    """One half where ``norm`` is within ``clip``, else minus one half; 0 where it is not finite. Scalars.

    Centred, so that a client moves the sum of all bits by one half at most, and not by one.
    """
    return torch.where(norm.isfinite(), (norm <= clip).to(clip.dtype) - 0.5, 0.0).to(clip.dtype)


def moved(clip: Tensor, bits: Tensor, cohort: int, quantile: float, lr: float, first: float) -> Tensor:
    """The next clip, from the noised sum of the bits; a client that is missing counts half. Scalars."""
    share = bits.double() / cohort + 0.5
    after = clip.double() * torch.exp(-lr * (share - quantile))
    return after.clamp(first / REACH, first * REACH).to(clip.dtype)


def values_noise(noise_multiplier: float, count_noise: float) -> float:
    """The noise multiplier of the values, so that they and the bits together cost ``noise_multiplier``.

    Each is a Gaussian mechanism, the bits' with multiplier ``2 * count_noise`` because their sensitivity is one half;
    and the inverse squares of multipliers add up (Theorem 1 of the paper).

    >>> round(values_noise(1.0, 2.0), 4)
    1.0328

    Raises:
        ConfigError: if the count alone would cost as much or more.
    """
    if noise_multiplier == 0:
        return 0.0
    if 2 * count_noise <= noise_multiplier:
        raise ConfigError(
            f"adaptive.count_noise: {count_noise:g} must be more than half of the noise multiplier "
            f"{noise_multiplier:g}, or the count of unclipped clients alone costs more than the whole"
        )
    return 1 / math.sqrt(noise_multiplier**-2 - (2 * count_noise) ** -2)


def count_noise(noise_multiplier: float, cohort: int) -> float:
    """A good deviation for the noise on the count: the paper's cohort / 20, but never more than 3.3 % more noise on the values."""
    return math.ceil(1e4 * max(cohort / 20, 2 * noise_multiplier)) / 1e4
