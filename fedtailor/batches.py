"""From a site's examples to one round of padded Poisson batches, drawn alike in a deployment and in a simulation."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedtailor import seeds
from fedtailor.recipe import Part
from fedtailor.study import LocalTraining, Plan
from fedtailor.tree import Tree


def draw(local: LocalTraining, examples: int, seed: int, round: int, client: str) -> Tensor:
    """Which examples each local step sees: a seeded, reproducible Poisson sample ``[S, N]`` of 0.0 and 1.0.

    For training without privacy and for simulations. A private deployment draws from a CSPRNG instead.
    """
    rows = [
        torch.rand(examples, generator=seeds.generator(seed, "sample", round, client, step)) < local.rate
        for step in range(local.steps)
    ]
    return torch.stack(rows).float()


def choices(plan: Plan, round: int, client: str) -> Tensor:
    """The public number of a client and round that a strategy's own random choices are keyed by, once a step: ``[S]``."""
    return torch.tensor(seeds.number(plan.seed, "choices", round, client)).expand(plan.local.steps)


def pack(part: Part, mask: Tensor, rate: float, width: int | None = None) -> Tree:
    """Gather each step's examples and pad them to ``width`` (default: the largest step).

    Shapes:
        mask: ``[S, N]``; returns ``x [S, B, ...]``, ``y [S, B]``, ``live [S, B]``, ``scale [S]``.
    """
    counts = mask.sum(1).long()
    width = max(width or 0, int(counts.max()), 1)
    index = torch.stack([pad(row.nonzero()[:, 0], (0, width - int(n))) for row, n in zip(mask, counts, strict=True)])
    live = (torch.arange(width) < counts[:, None]).float()
    scale = torch.full((len(mask),), 1.0 / (rate * len(part.y)))
    return {"x": part.x[index], "y": part.y[index], "live": live, "scale": scale}
