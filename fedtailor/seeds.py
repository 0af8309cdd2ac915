"""Seeded randomness that depends on what it is for, not on the order in which it is asked for.

Every draw is keyed by (seed, purpose, round, client, step), so that results depend neither on block size nor on the
number of workers, and a simulation and a deployment of one study draw alike. It is for reproducibility only: noise
that a privacy guarantee rests on comes from :mod:`fedtailor.privacy.csprng`.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor


def generator(seed: int, purpose: str, *key: int | str) -> torch.Generator:
    """A torch generator for one purpose.

    >>> a, b = generator(0, "batch", 3, "va"), generator(0, "batch", 3, "va")
    >>> bool((torch.rand(4, generator=a) == torch.rand(4, generator=b)).all())
    True
    """
    return torch.Generator().manual_seed(number(seed, purpose, *key))


def number(seed: int, purpose: str, *key: int | str) -> int:
    """A number of 63 bits for one purpose."""
    return int.from_bytes(_begun(seed, purpose, *key).digest()[:8], "little") >> 1


def numbers(seed: int, purpose: str, *key: int | str) -> Callable[[int], int]:
    """The numbers of a purpose whose keys begin alike, by the last part of the key.

    >>> numbers(0, "sample", 3, "va")(2) == number(0, "sample", 3, "va", 2)
    True
    """
    begun = _begun(seed, purpose, *key)

    def last(part: int) -> int:
        digest = begun.copy()
        digest.update(f"\x1fint:{part}".encode())
        return int.from_bytes(digest.digest()[:8], "little") >> 1

    return last


def _begun(seed: int, purpose: str, *key: int | str) -> "hashlib._Hash":
    text = "\x1f".join(["fedtailor", str(seed), purpose, *[f"{type(k).__name__}:{k}" for k in key]])
    return hashlib.sha256(text.encode())


def uniform(number: Tensor, count: int, skip: int = 0) -> Tensor:
    """``count`` draws from [0, 1) in steps of 2**-24, from a scalar int64 alone: the same under ``vmap`` and without.

    The draws ``skip`` to ``skip + count`` of SplitMix64, which a generator object could not make under ``vmap``.
    Steele et al. 2014, https://doi.org/10.1145/2714064.2660195. Reproducible, and so never for privacy.

    >>> uniform(torch.tensor(7), 3), uniform(torch.tensor(7), 1, skip=2)
    (tensor([0.3898, 0.0168, 0.9008]), tensor([0.9008]))
    """
    z = number + torch.arange(skip + 1, skip + count + 1, device=number.device) * _GOLDEN
    z = (z ^ _shifted(z, 30)) * _MIX[0]
    z = (z ^ _shifted(z, 27)) * _MIX[1]
    return _shifted(z ^ _shifted(z, 31), 40).float() / 2**24


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # the constants as signed numbers: int64 arithmetic wraps
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A shift to the right that brings in zeros, not the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
