"""From a site's examples to one round of padded batches, drawn alike in a deployment and in a simulation.

They are Poisson samples, or, without privacy, a shuffled order's parts: every ``local.epoch`` steps then see each example
once. "Local epochs" of the literature (McMahan et al. 2017, Algorithm 1, https://arxiv.org/abs/1602.05629) are such steps.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedtailor import seeds
from fedtailor.recipe import Part
from fedtailor.study import LocalTraining, Plan
from fedtailor.tree import Tree


def draw(local: LocalTraining, examples: int, seed: int, round: int, client: str) -> Tensor:
    """Which examples each local step sees: ``[S, N]`` of 0.0 and 1.0, seeded and reproducible.

    For training without privacy and for simulations. A private deployment draws from a CSPRNG instead.
    """
    return sampled(local, [examples], seed, round, [client]).float()


def sampled(local: LocalTraining, sizes: Sequence[int], seed: int, round: int, clients: Sequence[str]) -> Tensor:
    """:func:`draw` of several clients, their examples one after another's: ``[S, sum(sizes)]``, true or false."""
    if local.sampling == "poisson":
        keys = [seeds.numbers(seed, "sample", round, client) for client in clients]
        return _uniform(local.steps, sizes, keys) < local.rate
    keys = [seeds.numbers(seed, "shuffle", round, client) for client in clients]
    step, epochs = torch.arange(local.steps), math.ceil(local.steps / local.epoch)
    dealt = _dealt(_uniform(epochs, sizes, keys), sizes, local.epoch)
    return dealt[step // local.epoch] == (step % local.epoch)[:, None]


def _uniform(times: int, sizes: Sequence[int], keys: Sequence[Callable[[int], int]]) -> Tensor:
    """``times`` draws from [0, 1) for each example of several clients, ``[times, sum(sizes)]``, each client's by its key."""
    drawn, generator = torch.empty(times, sum(sizes)), torch.Generator()
    rows = iter(torch.split(drawn.view(-1), [*sizes] * times))
    for time in range(times):
        for key, size in zip(keys, sizes, strict=True):
            torch.rand(size, generator=generator.manual_seed(key(time)), out=next(rows))
    return drawn


def _dealt(drawn: Tensor, sizes: Sequence[int], parts: int) -> Tensor:
    """Which of ``parts`` parts, as equal as can be, each client's examples fall into by the order of ``drawn [E, N]``."""
    rows = torch.tensor(sizes)
    client = torch.arange(len(sizes)).repeat_interleave(rows)
    order = (drawn.double() + client).argsort(stable=True, dim=1)  # a client's examples stay among themselves
    rank = torch.arange(len(client)) - (rows.cumsum(0) - rows)[client]
    part = ((rank + 1) * parts - 1) // rows[client]
    return torch.empty_like(order).scatter_(1, order, part.expand_as(order))


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


def scales(rate: float | None, live: Tensor, sizes: Sequence[int]) -> Tensor:
    """What makes a mean of each step's sum: ``[K, S]``, of ``live [K, S, B]`` and the clients' numbers of examples.

    Args:
        rate: of the Poisson samples, whose mean is over their expected size; None: over the examples of each.
    """
    if rate is None:
        return 1 / live.sum(-1).clamp(min=1)
    return torch.tensor([1.0 / (rate * size) for size in sizes]).to(live)[:, None].expand(live.shape[:2])


def pack(part: Part, mask: Tensor, rate: float | None, width: int | None = None) -> Tree:
    """Gather each step's examples and pad them to ``width`` (default: the largest step).

    Args:
        rate: see :func:`scales`.

    Shapes:
        mask: ``[S, N]``; returns ``x [S, B, ...]``, ``y [S, B]``, ``live [S, B]``, ``scale [S]``.
    """
    rows, live = (each.to(part.y.device) for each in numbered(mask, [mask.shape[1]], width))
    scale = scales(rate, live, [len(part.y)])
    return {"x": part.x[rows[0]], "y": part.y[rows[0]], "live": live[0], "scale": scale[0]}
