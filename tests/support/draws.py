"""Random sources of which a test knows the draws."""

import torch

from fedtailor.privacy.csprng import Csprng


class Recorded(Csprng):
    """Draws as the real source does, and keeps what it drew."""

    def __init__(self, key):
        super().__init__(key)
        self.masks, self.noises = [], []

    def derive(self, purpose):
        return self

    def bernoulli_mask(self, count, rate):
        self.masks.append(super().bernoulli_mask(count, rate))
        return self.masks[-1]

    def add_normal(self, x, std):
        out = super().add_normal(x, std)
        self.noises.append(out - x)
        return out


class Everybody(Csprng):
    """Every example in every batch; no noise where the multiplier is 0."""

    def derive(self, purpose):
        return self

    def bernoulli_mask(self, count, rate):
        return torch.ones(count).bool()
