"""Seeded noise for simulations, drawn fast: to study accuracy with, never for a promise.

AES of (the client's number, a counter) gives eight times 16 bits; they choose among 65,536 quantiles of the normal
distribution, scaled to variance 1. The values repeat on every machine, depend on the client's number alone, and end at
4.3 deviations, where a true normal has 1.5 draws of 100,000 beyond: who audits tails needs other noise.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

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
KEY = b"fedtailor: noise"  # no secret: what is drawn follows from the clients' numbers, which follow from the seed
EACH = 8  # values of one block of the cipher


def seeded(like: Tree, std: float) -> Noise:
    """Noise of deviation ``std`` for all parameters of ``like``: one stream a client. A step's is overwritten by the next's.

    Its buffers outlive a round, because to ask the system for such anew takes longer than to fill them.
    """
    total, dtype = sum(p.numel() for p in tree.leaves(like)), tree.leaves(like)[0].dtype
    device = tree.leaves(like)[0].device
    exact = dtype == torch.double
    rooms = dict[tuple[int, int], tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[Any]]]()

    def noise(numbers: Tensor, steps: int) -> Iterator[Tensor]:
        at_once = steps if total * steps <= AT_ONCE else 1
        blocks = -(-at_once * total // EACH)
        table = _quantiles(std, exact)
        cipher = Cipher(algorithms.AES(KEY), modes.ECB()).encryptor()  # noqa: S305  # no block comes twice
        if (size := (len(numbers), blocks)) not in rooms:
            rooms.clear()  # of a block of another size
            plain = np.empty((*size, 2), np.int64)
            rooms[size] = plain, np.empty(plain.nbytes + 15, np.uint8), np.empty((size[0], blocks * EACH), table.dtype)
        plain, bits, drawn = rooms[size]
        plain[..., 0] = numbers.numpy(force=True)[:, None]
        for step in range(steps):
            if step % at_once == 0:
                plain[..., 1] = np.arange(step * blocks, (step + 1) * blocks)
                cipher.update_into(plain.data.cast("B"), bits.data)
                np.take(table, bits[: plain.nbytes].view(np.uint16).reshape(drawn.shape), out=drawn, mode="wrap")
            now = torch.from_numpy(drawn)[:, step % at_once * total :][:, :total]
            yield now.to(device, dtype)

    return noise


@lru_cache(maxsize=4)
def _quantiles(std: float, exact: bool) -> NDArray[Any]:
    from scipy.special import ndtri

    values: NDArray[np.float64] = ndtri((np.arange(VALUES) + 0.5) / VALUES)
    values *= std / values.std()
    return values if exact else values.astype(np.float32)
