"""Data sets that benchmarks read from ``$FEDTAILOR_DATA``, and how MNIST is dealt out among clients."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedtailor import seeds

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"  # beside a checkout, unless the environment says where
DATA = Path(os.environ.get("FEDTAILOR_DATA", BESIDE))
MNIST = DATA / "mnist" / "mnist.npz"


class World(NamedTuple):
    """Images and labels, and which rows each client has."""

    x: Tensor  # [N, 784]
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    clients: list[Tensor]


def mnist(images: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first ``images`` of the training part, and the test part."""
    data = np.load(MNIST, allow_pickle=False)
    x, test_x = (torch.from_numpy(data[k]).reshape(-1, 784).float() / 255 for k in ("x_train", "x_test"))
    y, test_y = (torch.from_numpy(data[k]).long() for k in ("y_train", "y_test"))
    return x[:images], y[:images], test_x, test_y


def dirichlet(y: Tensor, clients: int, alpha: float, seed: int) -> list[Tensor]:
    """Each class dealt out by shares drawn from Dirichlet(alpha), drawn again until every client has 20 rows."""
    rng = np.random.default_rng(seeds.number(seed, "dirichlet"))
    while True:
        parts: list[list[int]] = [[] for _ in range(clients)]
        for label in range(10):
            rows = rng.permutation(np.flatnonzero(y.numpy() == label))
            cuts = (np.cumsum(rng.dirichlet([alpha] * clients))[:-1] * len(rows)).astype(int)
            for part, some in zip(parts, np.split(rows, cuts), strict=True):
                part.extend(some.tolist())
        if min(map(len, parts)) >= 20:
            return [torch.tensor(part) for part in parts]


def two_classes(y: Tensor, clients: int) -> list[Tensor]:
    """Client k has half of the rows of class k and half of those of the next."""
    halves = [(y == label).nonzero()[:, 0].chunk(2) for label in range(10)]
    return [torch.cat([halves[k % 10][0], halves[(k + 1) % 10][1]]) for k in range(clients)]


def passes(rows: Tensor, batch: int, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``steps`` batches of passes over ``rows``, each in a new order; a pass's last batch is what is left of it.

    Shapes:
        out: indices ``[steps, batch]``, and 1.0 where there is one ``[steps, batch]``; the others repeat a row.
    """
    index, live = torch.zeros(0, batch, dtype=torch.long), torch.zeros(0, batch)
    short = -len(rows) % batch
    while len(index) < steps:
        order = torch.cat([rows[torch.randperm(len(rows), generator=generator)], rows[:1].expand(short)])
        there = torch.cat([torch.ones(len(rows)), torch.zeros(short)])
        index, live = torch.cat([index, order.view(-1, batch)]), torch.cat([live, there.view(-1, batch)])
    return index[:steps], live[:steps]
