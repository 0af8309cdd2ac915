"""Many small products at once, which MKL, torch's library for them, does slowly on AMD's processors.

A linear layer's outputs for a small batch of images are such (few long rows by a few others), and so are the gradients of
every image's convolution. numpy comes with OpenBLAS, which has kernels of its own for small products: 1.5 to 3 times as
fast for the former, 1.4 to 10 times for the latter, measured on one EPYC; on another 0.6 to 1 time and 1 to 2.5 times.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]
from torch import Tensor

MOST = 10**6  # multiplications of one product that OpenBLAS takes for small
THREADS = 2  # of torch's, at most, where images' gradients are made aside: more share them out, and win against one
CHANNELS = 4  # of an image, from which its products are better shifted than made of patches
NEAR = 1 << 17  # numbers that are multiplied nine times over: they stay in the nearest cache
LONG = 1024  # numbers of a row that make up for the way there and back


def inner(a: Tensor, b: Tensor) -> Tensor:
    """``[K, M, D]`` and ``[K, N, D]`` to the inner products ``[K, M, N]`` of their rows."""
    if not few_and_long(a, b):
        return torch.bmm(a, b.mT)
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[1])
    _aside(a, b.mT, out, MOST // a[0].numel())
    return out


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``[K, M, D]`` times ``[K, D, N]`` into ``out [K, M, N]``: of every image's patches and gradients, say."""
    if _here(a) and not (a.requires_grad or b.requires_grad):
        _aside(a, b, out, b.shape[2])
    else:
        torch.bmm(a, b, out=out)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``[M, D]`` times ``[D, N]``: of many rows with many."""
    if a.requires_grad or b.requires_grad:
        return a @ b
    if _alone(a):
        out = a.new_empty(1, a.shape[0], b.shape[1])
        _aside(a[None], b[None], out, b.shape[1])
        return out[0]
    wide = b.shape[1] > a.shape[0] and b.shape[1] % 2 == 0
    if not wide or a.device.type != "cpu" or torch.get_num_threads() != 2:
        return a @ b
    halves = torch.bmm(a[None].expand(2, -1, -1), b.reshape(len(b), 2, -1).transpose(0, 1))
    return halves.transpose(0, 1).flatten(1)  # a half a thread: MKL shares a wide product out less well, by a tenth


def with_each_other(x: Tensor, out: Tensor) -> None:
    """The inner products of the rows of ``x [K, N, D]``."""
    if _alone(x):
        _aside(x, x.mT, out, x.shape[1])
    else:
        torch.bmm(x, x.mT, out=out)


def shiftable(x: Tensor) -> bool:
    """Whether :func:`shifted` is there for images ``[N, C, ...]``, and quicker than a product of patches."""
    return x.shape[1] >= CHANNELS and _here(x)


def shifted(images: Tensor, deltas: Tensor, offsets: list[int]) -> Tensor:
    """Of each ``[R, C]`` and ``[T, O]`` the products of rows, ``offset`` apart: ``[N, len(offsets), C, O]``.

    With an image's pixels as rows and what a convolution's output lacks in width made up by zeros, those are its
    gradient of the weight, one pixel of the kernel after another, without a copy of the image for each.
    """
    out = images.new_empty(len(images), len(offsets), images.shape[2], deltas.shape[2])
    _shifted(images, deltas, offsets, out)
    return out


def few_and_long(a: Tensor, b: Tensor) -> bool:
    """Whether products of these rows are better made aside; nothing that a gradient is taken of is."""
    rows, others, length = a.shape[1], b.shape[1], a.shape[2]
    if length < LONG or min(rows, others) < 2 or rows * length * 2 > MOST or a.requires_grad or b.requires_grad:
        return False
    return _alone(a)


def _alone(x: Tensor) -> bool:
    """Whether there is one thread: two do better by torch's library, which shares out large products and many of them."""
    return torch.get_num_threads() == 1 and _here(x)


def _here(x: Tensor) -> bool:
    if torch.get_num_threads() > THREADS:
        return False
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and _openblas() is not None


@torch.library.custom_op("fedtailor::multiply", mutates_args={"out"})
def _aside(a: Tensor, b: Tensor, out: Tensor, columns: int) -> None:
    """``columns`` of a product at a time. An operation of torch's, so that who writes operations down sees it."""
    library = _openblas()
    assert library is not None
    with library.limit(limits=1):  # a second thread has nothing to win in a small product, and waits busily
        for part in (slice(first, first + columns) for first in range(0, b.shape[2], columns)):
            np.matmul(a.numpy(), b.numpy()[:, :, part], out=out.numpy()[:, :, part])


@torch.library.custom_op("fedtailor::shifted", mutates_args={"out"})
def _shifted(images: Tensor, deltas: Tensor, offsets: list[int], out: Tensor) -> None:
    library = _openblas()
    assert library is not None
    rows, others, made = images.numpy(), deltas.numpy(), out.numpy()
    count, at_once = deltas.shape[1], max(1, NEAR // (images[0].numel() + deltas[0].numel()))
    with library.limit(limits=1):
        for part in (slice(first, first + at_once) for first in range(0, len(rows), at_once)):
            for i, offset in enumerate(offsets):
                np.matmul(rows[part, offset : offset + count].swapaxes(1, 2), others[part], out=made[part, i])


@_shifted.register_fake
def _(images: Tensor, deltas: Tensor, offsets: list[int], out: Tensor) -> None:
    return None


@_aside.register_fake
def _(a: Tensor, b: Tensor, out: Tensor, columns: int) -> None:
    return None


@lru_cache(maxsize=1)
def _openblas() -> ThreadpoolController | None:
    """numpy's library where it is OpenBLAS and the processor is AMD's."""
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    found = ThreadpoolController().select(internal_api="openblas")
    return found if amd and found.info() else None
