"""A recipe's model that runs a block of clients at once, each on weights of its own."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from fedtailor import seeds
from fedtailor.recipe import Recipe
from fedtailor.simulations import convolutions
from fedtailor.simulations.convolutions import CONVOLUTION
from fedtailor.simulations.layers import EMBEDDING, GROUP_NORM, LAYER_NORM, LINEAR, RMS_NORM, Kind
from fedtailor.tree import Params

KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: LINEAR, nn.Embedding: EMBEDDING, nn.LayerNorm: LAYER_NORM, nn.RMSNorm: RMS_NORM,
    nn.GroupNorm: GROUP_NORM, nn.Conv1d: CONVOLUTION, nn.Conv2d: CONVOLUTION, nn.Conv3d: CONVOLUTION,
}  # fmt: skip


class NotBatchable(Exception):
    """This model cannot run clients folded into the batch axis; the message says why."""


class Layer(NamedTuple):
    """A layer with parameters, by its name in the model."""

    name: str
    module: Any
    kind: Kind
    names: tuple[tuple[str, str], ...]  # of its parameters: its own, and the model's

    def own(self, params: Params) -> Params:
        """Its part of ``params``, by its own names."""
        return {name: params[full] for name, full in self.names}

    def named(self, own: Params) -> Params:
        """The inverse of :meth:`own`."""
        return {self.full(name): value for name, value in own.items()}

    def full(self, name: str) -> str:
        """A parameter's name in the model."""
        return f"{self.name}.{name}" if self.name else name


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
    arranged: bool = (
        True  # whether images may lie with their channels innermost; a model that uses view needs them outermost
    )


class _Stand(nn.Module):
    """Stands in the model for a layer whose weights are each client's."""

    def __init__(self, layer: Layer, tape: Tape) -> None:
        super().__init__()
        self.run = layer, tape  # a tuple, so that the layer is not a child

    def forward(self, x: Tensor) -> Tensor:
        layer, tape = self.run
        x = convolutions.arranged(x) if tape.arranged and layer.kind is CONVOLUTION else x
        z, given = layer.kind.forward(layer.module, layer.own(tape.params), x, tape.clients)
        z = z if z.requires_grad else z.requires_grad_()
        tape.calls.append(Call(layer, given, z, z._version))
        return z


class _Dropout(nn.Module):
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


class Folded(NamedTuple):
    """A model without weights of its own."""

    module: nn.Module
    layers: tuple[Layer, ...]
    tape: Tape

    def run(self, params: Params, x: Tensor, clients: int) -> Tensor:
        """Outputs ``[K * B, ...]`` on ``x [K * B, ...]``; parameters are ``[K, ...]``, or ``[1, ...]`` where all share them."""
        self.tape.clients, self.tape.params, self.tape.calls = clients, params, []
        draws = self.tape.draws
        try:
            outputs: Tensor = self.module(x)
        except RuntimeError as error:
            if not (self.tape.arranged and "view size is not compatible" in str(error)):
                raise
            self.tape.arranged, self.tape.draws = False, draws
            return self.run(params, x, clients)
        for call in self.tape.calls:
            if call.output._version != call.version:
                raise NotBatchable(f"{call.layer.name}: its output is changed in place")
        return outputs


def folded(recipe: Recipe) -> Folded:
    """``recipe``'s model with each layer replaced by one that holds the clients' weights apart.

    Raises:
        NotBatchable: naming the parameter, or the setting, that no layer here covers.
    """
    module, tape = recipe.model(), Tape()
    stands: dict[nn.Module, nn.Module] = {}
    owners: dict[int, str] = {}  # a parameter's identity, and whose it is
    layers = []
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            raise NotBatchable(f"{name}: {type(part).__name__} mixes the examples of a batch")
        if type(part) is nn.Dropout:
            stands[part] = _Dropout(part.p, tape)
        if getattr(part, "inplace", False):
            part.inplace = False  # it would change what a gradient is taken of
        for own, p in part.named_parameters(recurse=False):
            if owners.setdefault(id(p), name) != name:
                raise NotBatchable(f"{name}.{own}: the same parameter as one of {owners[id(p)]}")
            if (why := _unfit(part)) is not None:
                raise NotBatchable(f"{name}.{own}: a parameter of {type(part).__name__}{why}")
        if any(True for _ in part.parameters(recurse=False)):
            names = tuple((own, f"{name}.{own}" if name else own) for own, _ in part.named_parameters())
            layers.append(Layer(name, part, KINDS[type(part)], names))
            stands[part] = _Stand(layers[-1], tape)
    return Folded(_replaced(module, stands), tuple(layers), tape)


def _unfit(part: Any) -> str | None:
    """Why a layer with parameters has no batched form; None where it has one."""
    if type(part) not in KINDS:
        return ", which has no batched form"
    if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks:
        return " with hooks"
    if isinstance(part, nn.Embedding) and (part.max_norm is not None or part.scale_grad_by_freq):
        return " with max_norm or scale_grad_by_freq"
    return convolutions.unfit(part) if KINDS[type(part)] is CONVOLUTION else None


def _replaced(module: nn.Module, stands: dict[nn.Module, nn.Module]) -> nn.Module:
    """``module`` with every use of some of its parts replaced."""
    for part in list(module.modules()):
        for name, child in part._modules.items():
            part._modules[name] = child if child is None else stands.get(child, child)
    return stands.get(module, module)
