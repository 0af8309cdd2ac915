"""Opacus' optimizer, made safe for data that are not finite and for noise that must not be guessed."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from opacus.optimizers import DPOptimizer
from torch.optim import Optimizer

from fedtailor.privacy.csprng import Csprng


@contextmanager
def quiet_hooks() -> Iterator[None]:
    """Without torch's remark that the examples themselves need no gradient, which is as it should be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing when gradients are computed", UserWarning)
        yield


class SafeDPOptimizer(DPOptimizer):  # type: ignore[misc]
    """Per-example clipping by Opacus, with two of its gaps closed.

    Formal guarantee: replacing one example by nothing changes the sum of clipped gradients by at most
    ``max_grad_norm`` in L2 norm, *also where a gradient is NaN or infinite*: such an example counts as zero. In plain
    Opacus it makes every parameter NaN, which tells that it was there. The noise, of deviation
    ``noise_multiplier * max_grad_norm`` on the sum, comes from a :class:`Csprng` and not from torch's 32-bit seed.
    """

    def __init__(self, optimizer: Optimizer, *, noise_multiplier: float, max_grad_norm: float, rng: Csprng) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=None,
            loss_reduction="sum",
        )
        self.rng = rng

    def accumulate(self) -> None:
        """Clip the per-example gradients of one physical batch, add them to the sum, and free them."""
        self.clip_and_accumulate()
        for p in self.params:
            p.grad_sample = p.grad = None

    def clip_and_accumulate(self) -> None:
        """As Opacus does, once every example whose gradient is not finite is zero."""
        samples = [self._get_flat_grad_sample(p) for p in self.params]
        finite = torch.stack([g.reshape(len(g), -1).isfinite().all(1) for g in samples]).all(0)
        if not finite.all():
            for p, g in zip(self.params, samples, strict=True):
                g[~finite] = 0.0
                p.grad_sample = g
        super().clip_and_accumulate()

    def add_noise(self) -> None:
        """Put the noisy sum into ``p.grad``; an empty Poisson sample is noise alone."""
        std = self.noise_multiplier * self.max_grad_norm
        for p in self.params:
            total = torch.zeros_like(p) if p.summed_grad is None else p.summed_grad
            p.grad = self.rng.add_normal(total, std).to(p.dtype)
            p.summed_grad = None
