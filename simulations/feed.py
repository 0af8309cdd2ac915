"""What a block is fed: examples by their row in one table of all clients' rows, and seeded noise, made when needed."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fedtailor import tree
from fedtailor.recipe import Part
from fedtailor.tree import Tree

Noise = Callable[[Tensor, int], Iterator[Tensor]]  # seeds [K], steps -> each step's noise [K, N], of all parameters
Rooms = dict[str, Tensor]
DRAWN = "drawn"  # of a batch: noise that was made before the steps


def room(rooms: Rooms, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory that outlives its use, because to ask the system for it anew takes longer than the use. Not cleared."""
    if name not in rooms or rooms[name].shape != shape or rooms[name].dtype != like.dtype:
        rooms[name] = like.new_empty(shape)
    return rooms[name]


def filled(
    rooms: Rooms, name: str, shape: tuple[int, ...], like: Tensor, rows: Tensor | None, fill: Callable[[Tensor], object]
) -> Tensor:
    """A :func:`room` that is filled by nothing but ``rows``: once, as long as these stay the same; None: every time."""
    out, before = room(rooms, name, shape, like), rooms.pop(f"{name} of", None)
    if rows is None or before is None or not torch.equal(rows, before):
        fill(out)
    if rows is not None:
        rooms[f"{name} of"] = rows
    return out


class Batch(NamedTuple):
    """One step of a block, its clients folded into the batch axis."""

    x: Tensor  # [K * B, ...]
    y: Tensor  # [K * B]
    weights: Tensor  # [K * B]: each example's weight in its client's mean; 0 for padding
    scale: Tensor  # [K]: what the noise is multiplied by
    noise: Tensor | None  # [K, N]: of all parameters, one's values after another's


class Places(NamedTuple):
    """Which examples of each client its steps see."""

    many: int  # N, of one client at most
    at: Tensor  # [S, K * B]: a step's, by their numbers in the clients' rows, one client's after another's
    rows: Tensor | None = None  # [K, N]: each once, filled up with one of them; None: all steps' examples, in order


class Feed(NamedTuple):
    """Where batches that name their examples and their noise get them from."""

    data: Part | None = None  # the rows that ``batches["rows"] [K, S, B]`` are numbers of
    noise: Noise | None = None  # made of ``batches["noise_seed"] [K]``
    like: Tree = {}  # noqa: RUF012  # has the shapes that such noise comes apart into

    def steps(
        self,
        batches: Tree,
        rooms: Rooms,
        noisy: bool = True,
        rate: Tensor | None = None,
        instead: Tensor | None = None,
    ) -> Iterator[Batch]:
        """Each step's batch; its examples and its noise are overwritten by the next one's.

        Args:
            rate: ``[K, S]``, which weights and scale are multiplied by: gradients are then steps.
            instead: given in the place of every step's examples, which are then not looked up.
        """
        live, scales = batches["live"], batches["scale"] if rate is None else batches["scale"] * rate
        count = live.shape[1]
        weights = (live * scales[:, :, None]).transpose(0, 1).reshape(count, -1).unbind()
        scale, noise = scales.transpose(0, 1).unbind(), self._noise(batches, count) if noisy else iter([None] * count)
        if self.data is None or "rows" not in batches:
            for step in range(count):
                x = batches["x"][:, step].flatten(0, 1) if instead is None else instead
                yield Batch(x, batches["y"][:, step].flatten(0, 1), weights[step], scale[step], next(noise))
            return
        data, rows = self.data, batches["rows"].transpose(0, 1).reshape(count, -1)
        labels = data.y[rows]
        x = room(rooms, "x", (rows.shape[1], *data.x.shape[1:]), data.x) if instead is None else instead
        for step in range(count):
            if instead is None:
                torch.index_select(data.x, 0, rows[step], out=x)  # data.x[rows] takes many times longer
            yield Batch(x, labels[step], weights[step], scale[step], next(noise))

    def form(self, batches: Tree) -> tuple[torch.Size, torch.dtype]:
        """An example's."""
        x: Tensor = batches["x"][0, 0] if self.data is None or "rows" not in batches else self.data.x
        return x.shape[1:], x.dtype

    def places(self, batches: Tree, looks: bool = True, even: bool = False) -> Places:
        """Which examples each client's steps see: each once, if they come by number and one ``looks``.

        Args:
            even: let their number be a twentieth of all steps' or a multiple of it, so that few numbers come about.
        """
        if looks and self.data is not None and "rows" in batches:
            return distinct(batches["rows"], 20 if even else None)
        clients, steps, batch = batches["live"].shape
        at = torch.arange(clients * steps * batch, device=batches["live"].device).view(clients, steps, batch)
        return Places(steps * batch, at.transpose(0, 1).reshape(steps, -1))

    def examples(self, batches: Tree, places: Places, rooms: Rooms) -> Tensor:
        """Those of ``places``, ``[K, N, ...]``; overwritten by another block's."""
        if self.data is None or "rows" not in batches:
            given: Tensor = batches["x"]
            return given.flatten(1, 2)
        x, rows = self.data.x, batches["rows"].flatten(1) if places.rows is None else places.rows
        shape = rows.numel(), *x.shape[1:]
        fill = partial(torch.index_select, x, 0, rows.flatten())
        found = filled(rooms, "examples", shape, x, places.rows, lambda out: fill(out=out))
        return found.view(*rows.shape, *found.shape[1:])

    def all(self, batches: Tree) -> Tree:
        """All steps as :func:`fedtailor.training.local_train` wants them: leaves ``[K, S, ...]``."""
        found = dict(batches)
        if self.data is not None and "rows" in found:
            rows = found.pop("rows")
            found |= {"x": self.data.x[rows], "y": self.data.y[rows]}
        if "noise_seed" in found:
            apart = parting(self.like)
            each = [apart(drawn.clone()) for drawn in self._seeded(batches)]
            del found["noise_seed"]
            found["noise"] = tree.map(lambda *xs: torch.stack(xs, 1), *each)
        return found

    def shapes(self, batches: Tree) -> Tree:
        """The shapes that noise comes apart into, in its own order: a cast that was read from a file has another."""
        return (
            self.like
            if not {"noise_seed", DRAWN}.isdisjoint(batches)
            else tree.map(lambda x: x[0, 0], batches.get("noise", {}))
        )

    def drawn(self, batches: Tree) -> Tree:
        """The same with the noise of all steps in place of its seeds: ``batches[DRAWN] [K, S, N]``."""
        if self.noise is None or "noise_seed" not in batches:
            return batches
        others = {name: leaf for name, leaf in batches.items() if name != "noise_seed"}
        return others | {DRAWN: torch.stack([one.clone() for one in self._seeded(batches)], 1)}

    def _noise(self, batches: Tree, steps: int) -> Iterator[Tensor | None]:
        if DRAWN in batches:
            return iter(batches[DRAWN].unbind(1))
        if self.noise is not None and "noise_seed" in batches:
            return self._seeded(batches)
        given = tree.leaves(batches.get("noise", {}))
        return (torch.cat([x[:, step].flatten(1) for x in given], 1) if given else None for step in range(steps))

    def _seeded(self, batches: Tree) -> Iterator[Tensor]:
        assert self.noise is not None
        return self.noise(batches["noise_seed"], batches["live"].shape[1])


def distinct(rows: Tensor, parts: int | None = None) -> Places:
    """Of ``rows [K, S, B]`` each client's own, each once, ascending; as many as so many parts of all, or a few of them, are."""
    clients, steps, batch = rows.shape
    ordered, order = rows.flatten(1).sort(1)
    rank = torch.nn.functional.pad((ordered[:, 1:] != ordered[:, :-1]).cumsum(1), (1, 0))
    many = int(rank[:, -1].max()) + 1
    if parts is not None:
        many = steps * batch * -(-parts * many // (steps * batch)) // parts
    each = ordered[:, :1].repeat(1, many).scatter_(1, rank, ordered)
    at = torch.empty_like(order).scatter_(1, order, rank) + torch.arange(clients, device=rows.device)[:, None] * many
    return Places(many, at.view(clients, steps, batch).transpose(0, 1).reshape(steps, -1), each)


def parting(like: Tree) -> Callable[[Tensor], Tree]:
    """A function of ``[K, N]`` to a tree of the shapes of ``like``, leaves ``[K, ...]``."""
    shapes = {name: tuple(p.shape) for name, p in tree.flatten(like).items()}
    sizes = [math.prod(shape) for shape in shapes.values()]

    def apart(flat: Tensor) -> Tree:
        parts = zip(shapes.items(), torch.split(flat, sizes, 1), strict=True)
        return tree.unflatten({name: part.view(-1, *shape) for (name, shape), part in parts})

    return apart


NOTHING = Feed()
