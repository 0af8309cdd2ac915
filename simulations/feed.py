"""What a block is fed: examples by their row in one table of all clients' rows, and seeded noise, made when needed."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fedtailor import tree
from fedtailor.recipe import Part
from fedtailor.tree import Tree

Noise = Callable[[Tensor, int], Iterator[Tree]]  # seeds [K], steps -> each step's noise, leaves [K, ...]
Rooms = dict[str, Tensor]


def room(rooms: Rooms, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory that outlives its use, because to ask the system for it anew takes longer than the use. Not cleared."""
    if name not in rooms or rooms[name].shape != shape or rooms[name].dtype != like.dtype:
        rooms[name] = like.new_empty(shape)
    return rooms[name]


class Batch(NamedTuple):
    """One step of a block, its clients folded into the batch axis."""

    x: Tensor  # [K * B, ...]
    y: Tensor  # [K * B]
    weights: Tensor  # [K * B]: each example's weight in its client's mean; 0 for padding
    scale: Tensor  # [K]
    noise: Tree  # leaves [K, ...], or nothing


class Feed(NamedTuple):
    """Where batches that name their examples and their noise get them from."""

    data: Part | None = None  # the rows that ``batches["rows"] [K, S, B]`` are numbers of
    noise: Noise | None = None  # made of ``batches["noise_seed"] [K]``

    def steps(self, batches: Tree, rooms: Rooms, noisy: bool = True) -> Iterator[Batch]:
        """Each step's batch; its examples are overwritten by the next one's."""
        live = batches["live"]
        count = live.shape[1]
        weights = (live * batches["scale"][:, :, None]).transpose(0, 1).reshape(count, -1)
        scale = batches["scale"].transpose(0, 1)
        noise = self._noise(batches, count) if noisy else iter([{}] * count)
        if self.data is None or "rows" not in batches:
            for step in range(count):
                x, y = batches["x"][:, step].flatten(0, 1), batches["y"][:, step].flatten(0, 1)
                yield Batch(x, y, weights[step], scale[step], next(noise))
            return
        data, rows = self.data, batches["rows"].transpose(0, 1).reshape(count, -1)
        for step in range(count):
            x = room(rooms, "x", (rows.shape[1], *data.x.shape[1:]), data.x)
            torch.index_select(data.x, 0, rows[step], out=x)  # data.x[rows] takes many times longer
            yield Batch(x, data.y.index_select(0, rows[step]), weights[step], scale[step], next(noise))

    def all(self, batches: Tree) -> Tree:
        """All steps as :func:`fedtailor.training.local_train` wants them: leaves ``[K, S, ...]``."""
        found = dict(batches)
        if self.data is not None and "rows" in found:
            rows = found.pop("rows")
            found |= {"x": self.data.x[rows], "y": self.data.y[rows]}
        if "noise_seed" in found:
            each = list(self._noise(batches, batches["live"].shape[1]))
            del found["noise_seed"]
            found["noise"] = tree.map(lambda *xs: torch.stack(xs, 1), *each)
        return found

    def _noise(self, batches: Tree, steps: int) -> Iterator[Tree]:
        if self.noise is not None and "noise_seed" in batches:
            return self.noise(batches["noise_seed"], steps)
        noise = batches.get("noise", {})
        return (tree.map(lambda x, step=step: x[:, step], noise) if noise else {} for step in range(steps))


NOTHING = Feed()
