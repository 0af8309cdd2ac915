"""Products of a few long rows by a few others, which MKL, torch's library for them, does slowly on AMD's processors.

A linear layer's outputs for a small batch of images are such, and so are the inner products of a client's images. numpy
comes with OpenBLAS, which has kernels of its own for small products: 1.5 to 3 times as fast there, measured on an EPYC.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MOST = 10**6  # multiplications of one product that OpenBLAS takes for small
LONG = 1024  # numbers of a row that make up for the way there and back


def inner(a: Tensor, b: Tensor) -> Tensor:
    """``[K, M, D]`` and ``[K, N, D]`` to the inner products ``[K, M, N]`` of their rows."""
    return _aside(a, b) if few_and_long(a, b) else torch.bmm(a, b.mT)


def few_and_long(a: Tensor, b: Tensor) -> bool:
    """Whether products of these rows are better made aside; nothing that a gradient is taken of is."""
    rows, others, length = a.shape[1], b.shape[1], a.shape[2]
    if length < LONG or min(rows, others) < 2 or rows * length * 2 > MOST or a.requires_grad or b.requires_grad:
        return False
    return a.device.type == "cpu" and a.dtype in (torch.float32, torch.float64) and _by_amd()


@torch.library.custom_op("fedtailor::inner", mutates_args=())
def _aside(a: Tensor, b: Tensor) -> Tensor:  # an operation of torch's, so that who writes operations down sees it
    x, y = a.numpy(), b.numpy().swapaxes(1, 2)
    out = np.empty((*x.shape[:2], y.shape[2]), x.dtype)
    step = MOST // (x.shape[1] * x.shape[2])
    for first in range(0, y.shape[2], step):
        part = slice(first, first + step)
        np.matmul(x, y[:, :, part], out=out[:, :, part])
    return torch.from_numpy(out)


@_aside.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[1], b.shape[1])


@lru_cache(maxsize=1)
def _by_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
