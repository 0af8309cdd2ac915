"""The random source: known answers, distributions, and that nothing repeats."""

import copy
import math
import os
import pickle

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from scipy import stats

from fedtailor.privacy.csprng import Csprng, grid

KEY = bytes(range(32))


def keystream(purpose, count):
    """AES-256-CTR of zeros, computed in one piece."""
    key = HKDF(SHA256(), 32, None, f"fedtailor/csprng/1/{purpose}".encode()).derive(KEY)
    return np.frombuffer(Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(8 * count)), "<u8")


def normality(std):
    draws = Csprng(KEY).normal((200_000,), std, torch.float64).numpy()
    return stats.kstest(draws, "norm").pvalue


def test_the_streams_are_aes_256_in_counter_mode():
    rng, words = Csprng(KEY), keystream("uniform", 300_000)
    drawn = torch.cat([rng.uniform53(1), rng.uniform53(299_999)])  # across calls and chunks
    assert np.array_equal(drawn.numpy(), ((words >> np.uint64(11)).astype(float) + 0.5) * 2.0**-53)
    assert np.array_equal(Csprng(KEY).bernoulli_mask(1000, 0.25).numpy(), keystream("mask", 1000) < 2**62)
    words = keystream("normal", 1000)
    lower = stats.norm.ppf(((words & np.uint64(2**63 - 1)).astype(float) + 0.5) * 2.0**-64)
    expected = np.where(words >> np.uint64(63), -lower, lower)
    np.testing.assert_allclose(Csprng(KEY).normal((1000,), 1.0, torch.float64).numpy(), expected, atol=2.0**-20)


def test_one_key_gives_one_stream_and_purposes_do_not_interfere():
    a, b = Csprng(KEY), Csprng(KEY)
    b.bernoulli_mask(17, 0.5)
    assert torch.equal(a.normal((3, 5), 2.0), b.normal((3, 5), 2.0))
    assert torch.equal(a.derive("x").uniform53(9), b.derive("x").uniform53(9))
    assert not torch.equal(a.derive("x").uniform53(9), a.derive("y").uniform53(9))
    assert not torch.equal(Csprng.fresh().uniform53(9), Csprng.fresh().uniform53(9))
    assert not torch.equal(a.uniform53(9), a.uniform53(9))


def test_noise_is_normal_and_the_test_would_see_two_percent():
    assert normality(1.0) > 1e-3
    assert normality(1.02) < 1e-3
    assert normality(0.98) < 1e-3


@pytest.mark.parametrize("std", [1e-3, 0.7, 1.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_lies_on_its_grid_and_has_its_deviation(std, dtype):
    x = Csprng(KEY).normal((100, 1000), std, dtype)
    assert x.dtype == dtype and x.shape == (100, 1000)
    steps = x.double() / grid(std)
    assert torch.equal(steps, steps.round()) and grid(std) <= std * 2**-20
    assert abs(x.double().std().item() / std - 1) < 5 / math.sqrt(2 * x.numel())
    assert abs(x.double().mean().item() / std) < 5 / math.sqrt(x.numel())


def test_a_release_keeps_none_of_the_low_order_bits_of_what_it_hides():
    x = torch.rand(1000, dtype=torch.float64)
    out = Csprng(KEY).add_normal(x, 1.0) / grid(1.0)
    assert torch.equal(out, out.round())


def test_rare_words_refine_the_tail(monkeypatch):
    rng = Csprng(KEY)
    words = {"normal": np.array([0, 2**63, 5], np.uint64), "normal tail": np.array([0, 2**63, 2**62], np.uint64)}
    monkeypatch.setattr(rng, "_words", lambda stream, count: words[stream][:count])
    x = rng.normal((3,), 1.0, torch.float64)
    np.testing.assert_allclose(x.numpy(), [stats.norm.ppf(2.0**-118), -stats.norm.ppf(2.0**-65),
                                           stats.norm.ppf(5.25 * 2.0**-64)], atol=1e-5)  # fmt: skip


def test_consecutive_noise_is_fresh():
    rng, n = Csprng(KEY), 200_000
    a, b, c = rng.normal((n,), 1.0), rng.normal((n,), 1.0), rng.derive("round 2").normal((n,), 1.0)
    pairs = torch.corrcoef(torch.stack([a, b, c, a.roll(1)]))
    assert (pairs - torch.eye(4)).abs().max() < 6 / math.sqrt(n)
    assert a.unique().numel() > 0.8 * n


def test_the_mask_is_binomial():
    rng, n, rate = Csprng(KEY), 500, 0.1
    masks = torch.stack([rng.bernoulli_mask(n, rate) for _ in range(4000)]).double()
    sizes = masks.sum(1)
    assert abs(sizes.mean() - n * rate) < 5 * math.sqrt(n * rate * (1 - rate) / 4000)
    assert 0.9 < sizes.var() / (n * rate * (1 - rate)) < 1.1  # shuffled batches would have none
    each = stats.chisquare(torch.stack([masks.sum(0), 4000 - masks.sum(0)], 1)[0].numpy(), [400, 3600])
    assert each.pvalue > 1e-4
    assert not rng.bernoulli_mask(100, 0.0).any() and rng.bernoulli_mask(100, 1.0).all()


def test_the_key_stays_inside():
    rng = Csprng(KEY)
    assert KEY.hex() not in repr(rng) and repr(KEY) not in repr(rng)
    for leak in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="repeat its noise"):
            leak(rng)


def test_a_forked_child_may_not_draw_its_parents_noise(monkeypatch):
    rng = Csprng(KEY)
    rng.uniform53(1)
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as the child sees it
    with pytest.raises(RuntimeError, match="parent process"):
        rng.uniform53(1)


@pytest.mark.parametrize("bad", [lambda: Csprng(b"short"), lambda: Csprng(KEY).normal((1,), math.nan),
                                 lambda: Csprng(KEY).normal((1,), -1.0),
                                 lambda: Csprng(KEY).bernoulli_mask(1, 1.5)])  # fmt: skip
def test_nonsense_is_refused(bad):
    with pytest.raises(ValueError):
        bad()
