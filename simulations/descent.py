"""Steps of plain local SGD for a block of clients, each linear layer's in the way that moves the fewest numbers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedtailor.errors import ConfigError
from fedtailor.optimizers import SGD, Kept, Optimizer, descended
from fedtailor.simulations.feed import Rooms, room
from fedtailor.simulations.gradients import Part, Uses
from fedtailor.simulations.layers import LINEAR, Thin, beside, linear_bias
from fedtailor.simulations.products import product
from fedtailor.simulations.spanned import Spanned, fewer, large, spanned
from fedtailor.simulations.stands import Layer
from fedtailor.tree import Tree


@dataclass
class Seen:
    """What a linear layer was given, and the scaled gradients of what it made, from a block's first step on."""

    start: Tensor  # [P, D]
    inputs: Tensor  # [K, N, D], filled from the front
    deltas: Tensor  # [K, N, P]
    filled: int = 0

    def add(self, uses: Uses, clients: int) -> Thin:
        """The weights after one more step."""
        for given, delta in uses:
            deltas = delta.reshape(clients, -1, delta.shape[-1])
            part = slice(self.filled, self.filled + deltas.shape[1])
            self.inputs[:, part] = given.reshape(clients, -1, given.shape[-1])
            self.deltas[:, part] = deltas
            self.filled = part.stop
        return Thin(self.start, self.inputs[:, : self.filled], self.deltas[:, : self.filled])


def same(x: Tensor, examples: Tensor) -> bool:
    """Whether ``x`` is these examples, perhaps flattened."""
    return 0 != x.data_ptr() == examples.data_ptr() and x.numel() == examples.numel() and x.dtype == examples.dtype


@dataclass
class Descent:
    """Parameters ``[K, ...]`` on their way down; ``[1, ...]`` until the first step, where all clients share them.

    Args:
        steps: how many there will be.
        shared: whether all clients begin with the same.
        thin: whether the clients' own weights may never be made, where that is less work.
        rooms: for parameters and what replaces them, where nobody keeps either; None where somebody may.
        optimizer: where it is not plain, gradients come by :meth:`move`.
    """

    params: dict[str, Any]
    steps: int
    shared: bool = True
    thin: bool = False
    rooms: Rooms | None = None
    optimizer: Optimizer = SGD
    kept: Kept = field(default_factory=Kept)
    seen: dict[str, Seen] = field(default_factory=dict)  # by the weight's name
    spanned: dict[str, Spanned] = field(default_factory=dict)  # by the weight's name
    begun: bool = False
    own: set[str] = field(default_factory=set)  # parameters of this descent's making, which may be changed in place

    def span(self, layer: Layer, shape: torch.Size, known: Tree) -> Tensor:
        """Never make the weights of the layer that alone is given the examples; to be called before the first step.

        Args:
            shape: of an example.
            known: of them all, see :func:`fedtailor.simulations.spanned.examined`.

        Returns what the model is to be given in their place.
        """
        assert self.thin and self.shared and self.rooms is not None
        name = layer.full("weight")
        found = self.spanned[name] = spanned(self.params[name][0], shape, known, self.rooms)
        self.params[name] = found.now()
        return found.given

    def step(self, parts: list[Part], clients: int, x: Tensor) -> None:
        """One step, on ``x [K * B, ...]``, by gradients that have the learning rate in them: 0 where it is padding."""
        for part in parts:
            name = part.layer.full("weight")
            if part.layer.kind is not LINEAR or part.made is not None:
                self._descend(part.gradient(clients))
                continue
            if name in self.spanned:
                self._further(name, part.uses, x)
            elif self._is_seen(name, part.uses, clients):
                self.params[name] = self.seen[name].add(part.uses, clients)
            else:
                for given, delta in part.uses:
                    self._multiply(name, given, delta, clients)
            for _, delta in part.uses:
                self._descend(part.layer.named(linear_bias(part.layer.module, delta, clients)))
        self.begun = True

    def stray(self, noise: dict[str, Tensor], scale: Tensor, trains: Callable[[str], bool]) -> None:
        """``params - scale * noise``, leaves ``[K, ...]``, of those that ``trains``; in place, once they are our own."""
        for name, drawn in noise.items():
            if not trains(name):
                continue
            params, by = self.params[name], beside(scale, drawn)
            out = params if name in self.own else None
            self.params[name] = torch.addcmul(params, by, drawn, value=-1, out=out)
            self.own.add(name)

    def move(self, gradient: dict[str, Tensor], rate: Tensor, before: int) -> None:
        """A step at ``rate [K]``, after so many, of those parameters that have a gradient; what they were stays as it is."""
        if not self.optimizer.plain:
            moved, self.kept = descended(self.optimizer, self.params, gradient, self.kept, rate, before)
            self.params.update(moved)
            return
        for name, g in gradient.items():
            self.params[name] = torch.addcmul(self.params[name], beside(rate, g), g, value=-1)

    def explicit(self, clients: int) -> dict[str, Any]:
        """The parameters, leaves ``[K, ...]``."""
        assert not self.seen and not self.spanned, "they were never made"
        return {name: p.expand(clients, *p.shape[1:]) for name, p in self.params.items()}

    def total(self, weights: Tensor, start: dict[str, Tensor]) -> dict[str, Tensor]:
        """The clients' changes from ``start``, weighted by ``weights [K]`` and added up: leaves ``[1, ...]``."""
        found = {}
        for name, first in start.items():
            if name in self.spanned:
                found[name] = self.spanned[name].total(weights)[None]
            elif name in self.seen:
                thin: Thin = self.params[name]
                rows = (thin.deltas * beside(weights, thin.deltas)).flatten(0, 1)
                found[name] = product(rows.mT, thin.inputs.flatten(0, 1)).neg_()[None]
            else:
                changes = (self.params[name] - first).expand(len(weights), *first.shape)
                found[name] = (weights.to(first.dtype)[None] @ changes.flatten(1)).view(1, *first.shape)
        return found

    def _descend(self, steps: dict[str, Tensor]) -> None:
        """``params - steps``; in place, once they are our own."""
        for name, one in steps.items():
            if name in self.own:
                self.params[name].sub_(one)
            else:
                self.params[name] = self.params[name] - one
                self.own.add(name)

    def _multiply(self, name: str, given: Tensor, delta: Tensor, clients: int) -> None:
        """A linear layer's step without its gradient in between; in place, once the weights are our own."""
        weight = self.params[name]
        rows = given.reshape(clients, -1, given.shape[-1])
        deltas = delta.reshape(*rows.shape[:2], -1)
        out = weight if name in self.own else None
        if out is None and self.rooms is not None:
            out = room(self.rooms, name, (clients, *weight.shape[1:]), weight)
        first = weight if len(weight) == clients else weight.expand(clients, -1, -1)
        self.params[name] = torch.baddbmm(first, deltas.mT, rows, alpha=-1, out=out)
        self.own.add(name)

    def _is_seen(self, name: str, uses: Uses, clients: int) -> bool:
        """Whether a linear layer's rows of all steps are kept: where that is less work than its clients' weights."""
        if name in self.seen or self.begun or not self.thin or self.rooms is None or not self.shared:
            return name in self.seen
        start, features = self.params[name][0], self.params[name].shape[2]
        rows = sum(given.numel() // features for given, _ in uses) // clients * self.steps
        if large(clients, start) and fewer(rows, start):
            inputs = room(self.rooms, f"{name} inputs", (clients, rows, features), start)
            deltas = room(self.rooms, f"{name} deltas", (clients, rows, len(start)), start)
            self.seen[name] = Seen(start, inputs, deltas)
        return name in self.seen

    def _further(self, name: str, uses: Uses, x: Tensor) -> None:
        """One more step of a layer that is given the examples."""
        found = self.spanned[name]
        if len(uses) != 1 or not same(uses[0][0], x):
            raise ConfigError(
                f"recipe: {name} is given the examples when the model is looked at, and something else in a step; "
                "simulation.path=vmap"
            )
        found.add(uses[0][1])
        if found.steps < self.steps:
            self.params[name] = found.now()
