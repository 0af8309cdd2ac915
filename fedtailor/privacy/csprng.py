"""Randomness that a privacy guarantee may rest on: AES-256 in counter mode, from one secret key.

torch's CPU generator is seeded with 32 bits, so whoever sees noisy output can try every seed. Here the noise and the
sample are as hard to guess as an AES-256 key. Whoever holds the key can subtract the noise: treat it like the data.
"""

import math
import os
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint64]

_CHUNK = 1 << 17  # 64-bit words at a time: 1 MiB stays in the cache
_ZEROS = bytes(8 * _CHUNK)
_LOW63 = np.uint64(2**63 - 1)
_RARE = np.uint64(2**43)  # one word in 2**20 lies below and has its tail refined


def grid(std: float) -> float:
    """The spacing to which noise of deviation ``std`` is snapped: a power of two, about a millionth of it."""
    return 2.0 ** (math.floor(math.log2(std)) - 20)


def expand(key: bytes, purpose: str) -> bytes:
    """A 32-byte key for one purpose: HKDF-SHA256 (RFC 5869) without salt; keys of two purposes are unrelated."""
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=f"fedtailor/csprng/1/{purpose}".encode()).derive(key)


class Csprng:
    """A cryptographic random source: the same key gives the same draws, another key gives unrelated ones.

    Each kind of draw has its own key (:func:`expand`) and counter, so that masks and noise do not depend on how they
    interleave. The key is never printed, pickled or copied, and a forked child is refused: it would draw its parent's
    noise again.

    Raises:
        ValueError: if the key is not 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != 32:
            raise ValueError(f"key: {len(key)} bytes; a random source needs 32, for example from os.urandom(32)")
        self._key, self._pid, self._streams = bytes(key), os.getpid(), dict[str, CipherContext]()

    @classmethod
    def fresh(cls) -> "Csprng":
        """A source that nobody can repeat."""
        return cls(os.urandom(32))

    def __repr__(self) -> str:
        return "Csprng(key hidden)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Csprng is not copied or pickled: that would repeat its noise; derive() another one")

    def derive(self, purpose: str) -> "Csprng":
        """An independent source, keyed by this one's key and ``purpose``."""
        return Csprng(expand(self._key, f"derive/{purpose}"))

    def _words(self, stream: str, count: int) -> Words:
        if os.getpid() != self._pid:
            raise RuntimeError("this Csprng belongs to the parent process; give the child a key of its own")
        if stream not in self._streams:  # the key is used for this one stream, so the first counter may be zero
            cipher = Cipher(algorithms.AES(expand(self._key, stream)), modes.CTR(bytes(16)))
            self._streams[stream] = cipher.encryptor()
        out = bytearray(8 * count + 16)  # update_into asks for a spare block
        view = memoryview(out)
        for start in range(0, 8 * count, len(_ZEROS)):
            size = min(len(_ZEROS), 8 * count - start)
            self._streams[stream].update_into(memoryview(_ZEROS)[:size], view[start : start + size + 16])
        return np.frombuffer(out, "<u8", count)

    def seed(self, purpose: str) -> int:
        """A 63-bit seed for a generator on which no guarantee rests, such as dropout's."""
        return int(self._words(f"seed/{purpose}", 1)[0] >> np.uint64(1))

    def uniform53(self, count: int) -> Tensor:
        """Uniforms in (0, 1), never its ends: the midpoints of 2^53 equal cells; float64 ``[count]``."""
        cells = (self._words("uniform", count) >> np.uint64(11)).astype(np.float64)
        return torch.from_numpy(np.minimum((cells + 0.5) * 2.0**-53, 1 - 2.0**-53))

    def bernoulli_mask(self, count: int, rate: float) -> Tensor:
        """Each of ``count`` examples independently with probability ``rate``, rounded down to a multiple of 2^-64.

        Shapes:
            returns bool ``[count]``.
        """
        if not 0 <= rate <= 1:
            raise ValueError(f"rate: {rate} is not a probability from 0 to 1")
        words, threshold = self._words("mask", count), int(rate * 2**64)  # exact: a product with a power of two
        return torch.from_numpy(words < np.uint64(threshold)) if threshold < 2**64 else torch.ones(count).bool()

    def normal(self, shape: Sequence[int], std: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """Gaussian noise of deviation ``std``, in multiples of ``grid(std)``."""
        return self.add_normal(torch.zeros(tuple(shape), dtype=dtype), std)

    def add_normal(self, x: Tensor, std: float) -> Tensor:
        """``x`` plus Gaussian noise of deviation ``std``: :func:`add_normals` of this source alone."""
        if not (math.isfinite(std) and std >= 0):
            raise ValueError(f"std: {std} is not a finite deviation of at least 0")
        return add_normals(x, [(self, std)])

    def _standard(self, count: int) -> NDArray[np.float64]:
        words = self._words("normal", count)
        low = words & _LOW63
        u = low.astype(np.float64)
        u += 0.5
        if len(rare := (low < _RARE).nonzero()[0]):  # 2^-64 is coarse out there: add 53 bits below it
            tail = (self._words("normal tail", len(rare)) >> np.uint64(11)).astype(np.float64)
            u[rare] = low[rare].astype(np.float64) + (tail + 0.5) * 2.0**-53
        u *= 2.0**-64  # (0, 1/2]: the lower half, and the top bit is the sign
        from scipy.special import ndtri

        z: NDArray[np.float64] = ndtri(u, out=u)
        np.negative(z, out=z, where=words > _LOW63)
        return z


def add_normals(x: Tensor, terms: Sequence[tuple[Csprng, float]]) -> Tensor:
    """``x`` plus the sum of each source's Gaussian noise times its factor, in float64, snapped to ``grid``, in x's dtype.

    The deviation of the sum is the root of the factors' squares; a factor may be negative.

    Formal guarantee: the Gaussian mechanism, up to float64 rounding below the grid. Snapping comes after adding,
    so it is post-processing, and it erases the low-order bits by which the sum could be told from the noise:
    Mironov 2012, https://doi.org/10.1145/2382196.2382264; Jin et al. 2021, https://arxiv.org/abs/2112.05307.
    One word in 2^20 draws a second word, so that the tail is fine-grained and reaches 13 deviations.
    """
    std = math.hypot(*(factor for _, factor in terms))
    assert math.isfinite(std), "a factor of noise is finite"
    out = x.detach().clone().contiguous()
    if std == 0:
        return out
    flat, step = out.view(-1), grid(std)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        noisy = part.double().numpy()
        for source, factor in terms:
            noise = source._standard(part.numel())
            noise *= factor
            noisy = np.add(noise, noisy, out=noise)
        noisy /= step
        np.rint(noisy, out=noisy)
        noisy *= step
        part.copy_(torch.from_numpy(noisy))
    return out
