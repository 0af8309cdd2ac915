"""What a block is fed: examples by their row in one table of all clients' rows, and seeded noise, made when needed."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fedtailor import tree
from fedtailor.recipe import Part
from fedtailor.tree import Params, Tree

Noise = Callable[[Tensor], Tree]  # seeds [K] -> noise, leaves [K, ...]


Rooms = dict[str, Tensor]


def room(rooms: Rooms, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory that outlives its use, because to ask the system for it anew takes longer than the use. Not cleared."""
    if name not in rooms or rooms[name].shape != shape or rooms[name].dtype != like.dtype:
        rooms[name] = like.new_empty(shape)
    return rooms[name]


class Feed(NamedTuple):
    """Where batches that name their examples and their noise get them from."""

    data: Part | None = None  # the rows that ``batches["rows"] [K, S, B]`` are numbers of
    noise: Noise | None = None  # made of ``batches["noise_seed"] [K, S]``

    def step(self, batches: Tree, step: int, rooms: Rooms) -> Tree:
        """One step's batch, spelt out: leaves ``[K, ...]``. The examples are overwritten by the next one's."""
        batch: Tree = tree.map(lambda x: x[:, step], batches)
        if self.data is not None and "rows" in batch:
            rows = batch.pop("rows")
            batch["y"] = self.data.y.index_select(0, rows.flatten()).view(*rows.shape, *self.data.y.shape[1:])
            flat = room(rooms, "x", (rows.numel(), *self.data.x.shape[1:]), self.data.x)
            torch.index_select(self.data.x, 0, rows.flatten(), out=flat)  # x[rows] takes many times longer
            batch["x"] = flat.view(*rows.shape, *flat.shape[1:])
        if self.noise is not None and "noise_seed" in batch:
            batch["noise"] = self.noise(batch.pop("noise_seed"))
        return batch

    def all(self, batches: Tree) -> Tree:
        """All steps, spelt out: leaves ``[K, S, ...]``."""
        found = dict(batches)
        if self.data is not None and "rows" in found:
            rows = found.pop("rows")
            found |= {"x": self.data.x[rows], "y": self.data.y[rows]}
        if self.noise is not None and "noise_seed" in found:
            each = [self.noise(numbers) for numbers in found.pop("noise_seed").unbind(1)]
            found["noise"] = tree.map(lambda *xs: torch.stack(xs, 1), *each)
        return found


NOTHING = Feed()


def seeded(like: Params, std: float) -> Noise:
    """Seeded noise of deviation ``std``, for simulations only: one draw a seed, for all parameters at once."""
    sizes, shapes = [p.numel() for p in like.values()], [p.shape for p in like.values()]
    first = next(iter(like.values()))

    def noise(numbers: Tensor) -> Tree:
        flat = torch.empty(len(numbers), sum(sizes), dtype=first.dtype)
        for row, number in zip(flat, numbers.tolist(), strict=True):
            row.normal_(0.0, std, generator=torch.Generator().manual_seed(number))
        parts = torch.split(flat.to(first.device), sizes, 1)
        return {n: p.view(-1, *shape) for n, p, shape in zip(like, parts, shapes, strict=True)}

    return noise
