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
    return sampled(local, [examples], seed, round, [client]).float()


def sampled(local: LocalTraining, sizes: Sequence[int], seed: int, round: int, clients: Sequence[str]) -> Tensor:
    """:func:`draw` of several clients, their examples one after another's: ``[S, sum(sizes)]``, true or false."""
    drawn, generator = torch.empty(local.steps, sum(sizes)), torch.Generator()
    rows = iter(torch.split(drawn.view(-1), [*sizes] * local.steps))
    keys = [seeds.numbers(seed, "sample", round, client) for client in clients]
    for step in range(local.steps):
        for key, size in zip(keys, sizes, strict=True):
            torch.rand(size, generator=generator.manual_seed(key(step)), out=next(rows))
    return drawn < local.rate


def choices(plan: Plan, round: int, client: str) -> Tensor:
    """The public number of a client and round that a strategy's own random choices are keyed by, once a step: ``[S]``."""
    return chosen(plan, round, [client])[0]


def chosen(plan: Plan, round: int, clients: Sequence[str]) -> Tensor:
    """:func:`choices` of several clients, ``[K, S]``."""
    each = torch.tensor([seeds.number(plan.seed, "choices", round, client) for client in clients])
    return each[:, None].expand(-1, plan.local.steps)


FEWEST = 2  # places of a batch, padding included: a BatchNorm has nothing to go by in one


def numbered(mask: Tensor, sizes: Sequence[int], width: int | None = None) -> tuple[Tensor, Tensor]:
    """The rows that every step of every client sees, padded with row 0 to ``width`` (default: the largest step).

    Shapes:
        mask: ``[S, sum(sizes)]``, a client's examples after another's; returns row numbers, from 0 within each client, and
            which of them are live, both ``[K, S, B]``.
    """
    steps, clients, rows = len(mask), len(sizes), torch.tensor(sizes)
    step, place = mask.nonzero(as_tuple=True)  # a step's after another's, and within it a client's after another's
    client = torch.arange(clients).repeat_interleave(rows)[place]
    counts = torch.bincount(step * clients + client, minlength=steps * clients)
    width = max(width or 0, int(counts.max()), FEWEST)
    rank = torch.arange(len(step)) - (counts.cumsum(0) - counts)[step * clients + client]  # within its client's step
    found = torch.zeros(clients, steps, width, dtype=torch.long)
    found[client, step, rank] = place - (rows.cumsum(0) - rows)[client]
    live = torch.arange(width) < counts.view(steps, clients).T[..., None]
    return found, live.float()


def pack(part: Part, mask: Tensor, rate: float, width: int | None = None) -> Tree:
    """Gather each step's examples and pad them to ``width`` (default: the largest step).

    Shapes:
        mask: ``[S, N]``; returns ``x [S, B, ...]``, ``y [S, B]``, ``live [S, B]``, ``scale [S]``.
    """
    rows, live = (each.to(part.y.device) for each in numbered(mask, [mask.shape[1]], width))
    scale = torch.full((len(mask),), 1.0 / (rate * len(part.y)), device=part.y.device)
    return {"x": part.x[rows[0]], "y": part.y[rows[0]], "live": live[0], "scale": scale}
