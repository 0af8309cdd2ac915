"""What stands in a model for its layers: each client's weights instead of one's own, and a tape of what they did."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from fedtailor import seeds
from fedtailor.adapters import SHIFT, is_part
from fedtailor.simulations import convolutions
from fedtailor.simulations.convolutions import CONVOLUTION
from fedtailor.simulations.layers import Kind
from fedtailor.tree import Params


class NotBatchable(Exception):
    """This model cannot run clients folded into the batch axis; the message says why."""


class Mixing(NotBatchable):
    """Its outputs for an example depend on the others of a batch."""


class Layer(NamedTuple):
    """A layer with parameters, by its name in the model."""

    name: str
    module: Any
    kind: Kind
    names: tuple[tuple[str, str], ...]  # of its parameters: its own, and the model's
    moving: frozenset[str]  # those, by their own names, that local training moves
    fixed: Params  # those that are the recipe's: frozen, alike for all, leaves ``[1, ...]``

    def own(self, params: Params) -> Params:
        """Its part of ``params`` and what is frozen, by its own names; one may be all clients' and another each one's."""
        return {name: self.fixed[name] if name in self.fixed else params[full] for name, full in self.names}

    def named(self, own: Params) -> Params:
        """The inverse of :meth:`own`."""
        names = dict(self.names)
        return {names[name]: value for name, value in own.items()}

    def full(self, name: str) -> str:
        """A parameter's name in the model."""
        return dict(self.names)[name]


def layer_of(
    name: str, module: Any, kind: Kind, named: dict[str, tuple[str, nn.Parameter]], trains: Callable[[str], bool]
) -> Layer:
    """A layer some of whose parameters may be frozen.

    Args:
        named: the model's name of each parameter, by its own, and the parameter.
        trains: whether local training moves what the study is about, by the model's name.
    """
    ours = {own for own, (full, p) in named.items() if p.requires_grad or is_part(full, SHIFT)}
    moving = frozenset(own for own in ours if trains(named[own][0]))
    fixed = {own: p.detach()[None] for own, (_, p) in named.items() if own not in ours}
    names = tuple((own, full) for own, (full, _) in named.items())
    return Layer(name, module, kind if len(moving) == len(names) else _partly(kind, moving), names, moving, fixed)


def _partly(kind: Kind, moving: frozenset[str]) -> Kind:
    """``kind`` where only some of a layer's parameters have a gradient: their lengths are those of what is made."""

    def gradient(layer: Any, given: Tensor, delta: Tensor, clients: int) -> Params:
        return {own: g for own, g in kind.gradient(layer, given, delta, clients).items() if own in moving}

    return Kind(kind.forward, gradient)


class Call(NamedTuple):
    """One use of a layer in a forward pass."""

    layer: Layer
    given: Tensor
    output: Tensor
    version: int  # of the output, before anything could change it in place


@dataclass
class Tape:
    """What one forward pass of a block is told, and what it leaves behind."""

    clients: int = 0
    params: Params = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    seed: Tensor | None = None  # [K]: each client's, for dropout
    draws: int = 0  # dropouts so far
    looks: bool = True  # whether the pass may look at its own numbers
    careful: bool = False  # whether examples' gradients are measured in float64 from the start
    odd: Tensor | None = None  # []: not finite, where a length was not and nobody has looked
    arranged: bool = (
        True  # whether images may lie with their channels innermost; a model that uses view needs them outermost
    )


class Stand(nn.Module):
    """Stands in the model for a layer whose weights are each client's."""

    def __init__(self, layer: Layer, tape: Tape) -> None:
        super().__init__()
        self.run = layer, tape  # a tuple, so that the layer is not a child

    def forward(self, x: Tensor) -> Tensor:
        layer, tape = self.run
        x = convolutions.arranged(x) if tape.arranged and layer.kind is CONVOLUTION else x
        z, given = layer.kind.forward(layer.module, layer.own(tape.params), x, tape.clients)
        if not layer.moving:
            return z
        z = z if z.requires_grad else z.requires_grad_()
        tape.calls.append(Call(layer, given, z, z._version))
        return z


class Pool(nn.Module):
    """Stands for a pooling whose gradient comes as its images lie; torch would copy them to and fro otherwise."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.pool(x)
        if z.requires_grad and convolutions.innermost(x):
            z.register_hook(convolutions.arranged)  # type: ignore[no-untyped-call]
        return z


class Sequence(nn.Sequential):
    """Pools before it rectifies: the greatest of some numbers is found sooner than each of them made positive.

    Outputs and gradients are the same, bit for bit: where the greatest is not positive, both are zero.
    """

    def forward(self, x: Any) -> Any:
        parts = list(self)
        for i, (one, then) in enumerate(zip(parts, parts[1:], strict=False)):
            if type(one) is nn.ReLU and type(then) is Pool:
                parts[i : i + 2] = [then, one]
        for part in parts:
            x = part(x)
        return x


class Dropout(nn.Module):
    """Dropout whose choices are keyed by client, step and example: neither the block nor its padding shows."""

    def __init__(self, p: float, tape: Tape) -> None:
        super().__init__()
        self.p, self.tape = p, tape

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0:
            return x
        if self.tape.seed is None:
            raise NotBatchable("dropout needs a seed of each client, and the batches have none")
        count, self.tape.draws = x.numel() // self.tape.clients, self.tape.draws + 1
        drawn = seeds.uniform(self.tape.seed[:, None] ^ _DROPOUT, count, self.tape.draws << 40)
        return x * ((drawn >= self.p).view(x.shape).to(x.dtype) / max(1 - self.p, 1e-12))


_DROPOUT = int.from_bytes(b"dropout", "little")  # a strategy's own choices go by the same seed, and must not be these
