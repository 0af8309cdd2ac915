"""Seeded randomness that depends on what it is for, not on the order in which it is asked for.

Every draw is keyed by (seed, purpose, round, client, step), so that results depend neither on block size nor on the
number of workers, and a simulation and a deployment of one study draw alike. It is for reproducibility only: noise
that a privacy guarantee rests on comes from :mod:`fedtailor.privacy.csprng`.
"""

import hashlib

import torch


def generator(seed: int, purpose: str, *key: int | str) -> torch.Generator:
    """A torch generator for one purpose.

    >>> a, b = generator(0, "batch", 3, "va"), generator(0, "batch", 3, "va")
    >>> bool((torch.rand(4, generator=a) == torch.rand(4, generator=b)).all())
    True
    """
    text = "\x1f".join(["fedtailor", str(seed), purpose, *(f"{type(k).__name__}:{k}" for k in key)])
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
