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
from fedtailor.simulations.products import product, with_earlier

SMALL = 1 << 18  # weights of a block: so few stay in a processor's cache, and are quicker than what avoids them


@dataclass
class Seen:
    """What a linear layer was given, and the scaled gradients of what it made, from a block's first step on."""

    start: Tensor  # [P, D]
    inputs: Tensor  # [K, N, D], filled from the front
    deltas: Tensor  # [K, N, P]
    products: Tensor | None = None  # of inputs with earlier ones: they are the examples, and so were known at once
    filled: int = 0

    def add(self, name: str, uses: Uses, clients: int, examples: Tensor) -> Thin:
        """The weights after one more step, of a batch of ``examples``.

        Raises:
            ConfigError: if the inputs of all steps were taken to be the examples, and are not.
        """
        for given, delta in uses:
            deltas = delta.reshape(clients, -1, delta.shape[-1])
            part = slice(self.filled, self.filled + deltas.shape[1])
            if self.products is None:
                self.inputs[:, part] = given.reshape(clients, -1, given.shape[-1])
            elif not same(given, examples):
                raise ConfigError(
                    f"recipe: {name} is given the examples in one step and something else in another; simulation.path=vmap"
                )
            self.deltas[:, part] = deltas
            self.filled = part.stop
        known = None if self.products is None else self.products[:, part, : self.filled]  # its rows begin a batch later
        return Thin(self.start, self.inputs[:, : self.filled], self.deltas[:, : self.filled], known)


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
        examples: makes all steps' ``[K, S * B, ...]``, a client's one after another; None where others may be learnt from.
    """

    params: dict[str, Any]
    steps: int
    shared: bool = True
    thin: bool = False
    rooms: Rooms | None = None
    examples: Callable[[], Tensor] | None = None
    optimizer: Optimizer = SGD
    kept: Kept = field(default_factory=Kept)
    seen: dict[str, Seen] = field(default_factory=dict)  # by the weight's name
    begun: bool = False
    own: set[str] = field(default_factory=set)  # parameters of this descent's making, which may be changed in place

    def step(self, parts: list[Part], clients: int, x: Tensor) -> None:
        """One step, on ``x [K * B, ...]``, by gradients that have the learning rate in them: 0 where it is padding."""
        for part in parts:
            name = part.layer.full("weight")
            if part.layer.kind is not LINEAR or part.made is not None:
                self._descend(part.gradient(clients))
                continue
            if self.thin and self.rooms is not None and self.shared and not self.begun:
                self._begin(name, part.uses, clients, self.rooms, x)
            if name in self.seen:
                self.params[name] = self.seen[name].add(name, part.uses, clients, x)
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
        assert not self.seen, "they were never made"
        return {name: p.expand(clients, *p.shape[1:]) for name, p in self.params.items()}

    def total(self, weights: Tensor, start: dict[str, Tensor]) -> dict[str, Tensor]:
        """The clients' changes from ``start``, weighted by ``weights [K]`` and added up: leaves ``[1, ...]``."""
        found = {}
        for name, first in start.items():
            if name in self.seen:
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

    def _begin(self, name: str, uses: Uses, clients: int, rooms: Rooms, x: Tensor) -> None:
        """Make room for a linear layer's rows of all steps, where that is less work than its clients' weights."""
        outputs, features = self.params[name].shape[1:]
        rows = sum(given.numel() // features for given, _ in uses) // clients * self.steps
        if clients * outputs * features < SMALL or rows * (outputs + features) > 2 * outputs * features:
            return
        start = self.params[name][0]
        deltas = room(rooms, f"{name} deltas", (clients, rows, outputs), start)
        if self.examples is not None and self.steps > 1 and len(uses) == 1 and same(uses[0][0], x):
            inputs = self.examples().reshape(clients, rows, features)
            batch = rows // self.steps
            products = room(rooms, f"{name} products", (clients, rows - batch, rows - batch), start)
            with_earlier(inputs, batch, products)
            self.seen[name] = Seen(start, inputs, deltas, products)
            return
        inputs = room(rooms, f"{name} inputs", (clients, rows, features), start)
        self.seen[name] = Seen(start, inputs, deltas)
