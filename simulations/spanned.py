"""A linear layer that is given the examples themselves: what its clients' weights make of them, without the weights.

Plain SGD moves such a layer by multiples of what it is given, so that a client's weights stay a sum of what it began with
and of its own examples, whatever the number of steps (the representer theorem's reason, Schölkopf et al. 2001, section 3,
https://doi.org/10.1007/3-540-44581-1_27). So all examples are multiplied thrice: at first by the start, and with each
other; in the end by how much of each was added. A step reads rows of what the former two made. An example that several
steps see, as with local epochs, is multiplied as often as one that one step sees.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx, nn

from fedtailor.simulations import gradients
from fedtailor.simulations.feed import Feed, Places, Rooms, filled, room
from fedtailor.simulations.layers import Known, beside
from fedtailor.simulations.products import product, with_each_other
from fedtailor.tree import Tree

SMALL = 1 << 18  # weights of a block: so few stay in a processor's cache, and are quicker than what avoids them
MOVED = 30  # multiplications that take as long as a weight's way from memory and back
SLOWER = 3  # times as long
EXAMINED = "examined"  # of a batch: what is known of its examples
ARRANGES = {"flatten", "reshape", "view", "contiguous", torch.flatten, torch.reshape}


def first_of(module: nn.Module) -> str | None:
    """The name of the linear layer that is given what ``module`` is given, flattened perhaps, once, while nothing else is.

    None where there is none, or the module's code cannot be written down.
    """
    if any(part._forward_pre_hooks or part._forward_hooks for part in module.modules()):
        return None
    try:
        graph = fx.Tracer().trace(module)
    except Exception:  # whatever a model's code does that cannot be done with what is no number yet
        return None
    given, *others = (node for node in graph.nodes if node.op == "placeholder")
    while not others and len(given.users) == 1:
        (user,) = given.users
        part = module.get_submodule(str(user.target)) if user.op == "call_module" else None
        if type(part) is nn.Linear:
            called = [module.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"]
            return str(user.target) if called.count(part) == 1 else None
        if type(part) is not nn.Flatten and (user.target not in ARRANGES or user.args[:1] != (given,)):
            return None
        given = user
    return None


def large(clients: int, start: Tensor) -> bool:
    """Whether it is worth while to avoid a layer's weights ``[P, D]`` for each client."""
    return clients * start.numel() >= SMALL


def fewer(rows: int, start: Tensor) -> bool:
    """Whether so many rows of what a layer was given, and of gradients of what it made, are less than weights ``[P, D]``."""
    return rows * sum(start.shape) <= 2 * start.numel()


def pays(start: Tensor, rows: int, steps: int, batch: int) -> bool:
    """Whether products of a client's so many examples are less work than steps of weights ``[P, D]`` that every client has.

    On a CPU, in multiplications: of the examples twice by P, with each other, and of each batch by what was added of all;
    beside each batch twice by P, and weights that are read and written in every step. How many multiplications the latter
    come to, and how many times as long one of a step's small products takes, was measured.
    """
    outputs, features = start.shape
    if start.device.type != "cpu":
        return fewer(rows, start)
    products = rows * (2 * outputs + rows) * features + SLOWER * steps * batch * rows * outputs
    return products <= start.numel() * steps * (2 * batch + MOVED)


def size(start: Tensor, rows: int) -> int:
    """Bytes that so many examples of a client take here."""
    return rows * (sum(start.shape) + len(start) + rows) * start.element_size()


@dataclass
class Spanned:
    """Weights ``[K, P, D]`` on their way down: ``start - deltas.mT @ inputs``."""

    at: Tensor  # [S, K * B], see Places
    given: Tensor  # [K * B, ...]: stands for the examples, and is not to be read
    inputs: Tensor  # [K, N, D]
    deltas: Tensor  # [K, N, P], each input's so far, scaled by the learning rate
    made: Tensor  # [K, N, P]: of the inputs by the start
    products: Tensor | None  # [K, N, N] of the inputs; None if there is one step
    steps: int = 0  # done

    def now(self) -> Known:
        """The weights for the next step."""
        made = self._of_step(self.made)
        if not self.steps or self.products is None:
            return Known(made)
        return Known(made, self._of_step(self.products), self.deltas)

    def add(self, delta: Tensor) -> None:
        """One more step, by the scaled gradient ``[K * B, P]`` of what the layer made."""
        self.deltas.flatten(0, 1).index_add_(0, self.at[self.steps], delta)
        self.steps += 1

    def total(self, weights: Tensor) -> Tensor:
        """The clients' changes, weighted by ``weights [K]`` and added up: ``[P, D]``."""
        rows = (self.deltas * beside(-weights, self.deltas)).flatten(0, 1)
        return product(rows.mT, self.inputs.flatten(0, 1))

    def _of_step(self, x: Tensor) -> Tensor:
        """Of ``[K, N, ...]`` what the next step sees, ``[K, B, ...]``."""
        return x.flatten(0, 1).index_select(0, self.at[self.steps]).view(len(x), -1, x.shape[-1])


def worthwhile(start: Tensor, feed: Feed, batches: Tree, even: bool = False) -> Places | None:
    """The examples of a block's clients, if it is less work to make no weights of the layer that begins with ``[P, D]``.

    Args:
        even: see :meth:`fedtailor.simulations.feed.Feed.places`.
    """
    shape, dtype = feed.form(batches)
    clients, steps, batch = batches["live"].shape
    if shape.numel() != start.shape[1] or dtype != start.dtype or not large(clients, start):
        return None
    places = feed.places(batches, looks=gradients.waits(start), even=even)
    return places if pays(start, places.many, steps, batch) else None


def examined(start: Tensor, feed: Feed, batches: Tree, rooms: Rooms, even: bool) -> Tree:
    """``batches``, with what is known of their examples before any step, if no weights are made, see :func:`worthwhile`.

    Both the examples and their products are those of the block before where it had the same clients, as if all take part in
    every round.
    """
    if (places := worthwhile(start, feed, batches, even)) is None:
        return batches
    (clients, steps, _), rows = batches["live"].shape, places.many
    inputs = feed.examples(batches, places, rooms).reshape(clients, rows, -1)
    found = {"inputs": inputs, "at": places.at}
    if steps > 1:
        fill = partial(with_each_other, inputs)
        found["products"] = filled(rooms, "products", (clients, rows, rows), start, places.rows, fill)
    return batches | {EXAMINED: found}


def spanned(start: Tensor, shape: torch.Size, known: Tree, rooms: Rooms) -> Spanned:
    """Before the first step of weights that all clients begin with, ``[P, D]``, by what was :func:`examined`.

    Args:
        shape: of an example.
    """
    inputs = known["inputs"]
    made = product(inputs.flatten(0, 1), start.mT).view(*inputs.shape[:2], -1)
    deltas = room(rooms, "deltas", made.shape, start).zero_()
    given = _nothing(rooms, (known["at"].shape[1], *shape), start)
    return Spanned(known["at"], given, inputs, deltas, made, known.get("products"))


def _nothing(rooms: Rooms, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Of this shape; no number, so that any use shows."""
    if "nothing" not in rooms or rooms["nothing"].shape != shape:
        rooms["nothing"] = like.new_full(shape, math.nan)
    return rooms["nothing"]
