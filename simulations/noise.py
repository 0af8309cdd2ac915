"""Seeded noise for simulations, drawn fast: to study accuracy with, never for a promise.

AES in counter mode, keyed by the client's number, gives 16 bits a value; they choose among 65,536 quantiles of the normal
distribution, scaled to variance 1. The values repeat on every machine, depend on the client's number alone, and end at
4.3 deviations, where a true normal has 1.5 draws of 100,000 beyond: who audits tails needs other noise.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

from fedtailor import tree
from fedtailor.simulations.feed import Noise
from fedtailor.tree import Tree

AT_ONCE = 1 << 16  # numbers of a client's noise: so few are drawn for all steps in one call
VALUES = 1 << 16
SPARE = 15  # bytes that a cipher may write beyond what it was asked for


def seeded(like: Tree, std: float) -> Noise:
    """Noise of deviation ``std`` and the shapes of ``like``: one stream a client, for all parameters and steps."""
    flat = tree.flatten(like)
    sizes, first = [p.numel() for p in flat.values()], next(iter(flat.values()))
    total = sum(sizes)

    def noise(numbers: Tensor, steps: int) -> Iterator[Tree]:
        streams = [_stream(number) for number in numbers.tolist()]
        at_once = steps if total * steps <= AT_ONCE else 1
        table = _quantiles() * std
        values = table if first.dtype == torch.double else table.astype(np.float32)
        zeros, drawn = bytes(2 * at_once * total), first.new_empty(0)
        bits = np.empty((len(streams), len(zeros) + SPARE + 1), np.uint8)  # an even number, to be seen as 16 bits each
        for step in range(steps):
            if step % at_once == 0:
                for stream, row in zip(streams, bits, strict=True):
                    stream.update_into(zeros, row)
                chosen = bits.view(np.uint16)[:, : at_once * total]
                drawn = torch.from_numpy(np.take(values, chosen, mode="clip")).to(first.device, first.dtype)
            now = drawn[:, step % at_once * total :][:, :total]
            parts = zip(flat.items(), torch.split(now, sizes, 1), strict=True)
            yield tree.unflatten({name: part.view(len(streams), *p.shape) for (name, p), part in parts})

    return noise


def _stream(number: int):  # type: ignore[no-untyped-def]  # the library does not export the type
    key = number.to_bytes(8, "little", signed=True) * 2
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()


@lru_cache(maxsize=1)
def _quantiles() -> NDArray[np.float64]:
    from scipy.special import ndtri

    values: NDArray[np.float64] = ndtri((np.arange(VALUES) + 0.5) / VALUES)
    values /= values.std()
    return values
