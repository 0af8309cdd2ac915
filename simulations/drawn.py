"""Clients that draw their rows from one data set, with replacement: any number of them, none of which takes memory."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtailor import seeds
from fedtailor.errors import ConfigError


class Drawn(NamedTuple):
    """Client k's rows follow from the seed and k alone."""

    classes: tuple[NDArray[np.int64], ...]  # the rows of each
    prior: NDArray[np.float64]  # each one's share of the rows
    rows: int
    alpha: float | None
    seed: int

    def of(self, client: int) -> Tensor:
        """A client's rows, ascending; one that is drawn twice is there twice."""
        rng = np.random.default_rng(seeds.number(self.seed, "partition", "drawn", client))
        mixture = self.prior if self.alpha is None else rng.dirichlet(self.alpha * self.prior)
        counts = rng.multinomial(self.rows, mixture)
        found = [rows[rng.integers(len(rows), size=n)] for rows, n in zip(self.classes, counts, strict=True)]
        return torch.from_numpy(np.sort(np.concatenate(found)))

    def sizes(self, clients: Sequence[int]) -> Tensor:
        """All have the same number."""
        return torch.full((len(clients),), self.rows)


def drawn(y: Tensor, clients: int, rows: int, seed: int, alpha: float | None = None) -> Drawn:
    """``clients`` clients of ``rows`` rows each.

    Args:
        alpha: each client has a mixture of classes from Dirichlet(alpha * prior); None: the prior, that of the data.

    Raises:
        ConfigError: naming an argument that is out of range.
    """
    if y.ndim != 1 or not len(y) or bool((y != y).any()):
        raise ConfigError(f"y: shape {list(y.shape)} is not that of a list of labels without gaps")
    if type(rows) is not int or not 1 <= rows <= 10**7:
        raise ConfigError(f"rows={rows!r}: not a whole number from 1 to 1e7")
    if alpha is not None and not 1e-6 <= alpha <= 1e6:
        raise ConfigError(f"alpha={alpha}: not a number from 1e-6 to 1e6, or null")
    labels = np.unique(y.cpu().numpy(), return_inverse=True)[1]
    counts = np.bincount(labels)
    by_class = np.split(np.argsort(labels, kind="stable"), counts.cumsum()[:-1])
    return Drawn(tuple(by_class), counts / len(y), rows, alpha, seed)
