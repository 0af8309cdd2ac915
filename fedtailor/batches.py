"""From a site's examples to one round of padded Poisson batches, drawn alike in a deployment and in a simulation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedtailor import seeds
from fedtailor.recipe import Part
from fedtailor.study import LocalTraining, Plan
from fedtailor.tree import Tree


def draw(local: LocalTraining, examples: int, seed: int, round: int, client: str) -> Tensor:
    """Which examples each local step sees: a seeded, reproducible Poisson sample ``[S, N]`` of 0.0 and 1.0.

    For training without privacy and for simulations. A private deployment draws from a CSPRNG instead.
    """
    drawn, generator = torch.empty(local.steps, examples), torch.Generator()
    for step, row in enumerate(drawn):
        torch.rand(
            examples, generator=generator.manual_seed(seeds.number(seed, "sample", round, client, step)), out=row
        )
    return (drawn < local.rate).float()


def choices(plan: Plan, round: int, client: str) -> Tensor:
    """The public number of a client and round that a strategy's own random choices are keyed by, once a step: ``[S]``."""
    return torch.tensor(seeds.number(plan.seed, "choices", round, client)).expand(plan.local.steps)


def numbered(masks: Sequence[Tensor], width: int | None = None) -> tuple[Tensor, Tensor]:
    """The rows that every step of every client sees, padded with row 0 to ``width`` (default: the largest step).

    Shapes:
        masks: ``[S, N]``, N each client's own; returns row numbers and which of them are live, both ``[K, S, B]``.
    """
    found = [mask.nonzero() for mask in masks]
    steps = len(masks[0])
    step = torch.cat([each[:, 0] + client * steps for client, each in enumerate(found)])
    counts = torch.bincount(step, minlength=len(masks) * steps)
    width = max(width or 0, int(counts.max()), 1)
    place = torch.arange(len(step)) - (counts.cumsum(0) - counts)[step]  # within its step
    rows = torch.zeros(len(counts) * width, dtype=torch.long)
    rows[step * width + place] = torch.cat([each[:, 1] for each in found])
    live = (torch.arange(width) < counts[:, None]).float()
    return rows.view(len(masks), steps, width), live.view(len(masks), steps, width)


def pack(part: Part, mask: Tensor, rate: float, width: int | None = None) -> Tree:
    """Gather each step's examples and pad them to ``width`` (default: the largest step).

    Shapes:
        mask: ``[S, N]``; returns ``x [S, B, ...]``, ``y [S, B]``, ``live [S, B]``, ``scale [S]``.
    """
    rows, live = (each.to(part.y.device) for each in numbered([mask], width))
    scale = torch.full((len(mask),), 1.0 / (rate * len(part.y)), device=part.y.device)
    return {"x": part.x[rows[0]], "y": part.y[rows[0]], "live": live[0], "scale": scale}
