"""A recipe's model that runs a block of clients at once, each on weights of its own."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedtailor.adapters import SHIFT, is_part
from fedtailor.recipe import Recipe
from fedtailor.simulations import attention, convolutions, recurrent
from fedtailor.simulations.convolutions import CONVOLUTION
from fedtailor.simulations.layers import EMBEDDING, GROUP_NORM, LAYER_NORM, LINEAR, RMS_NORM, Kind
from fedtailor.simulations.stands import Dropout, Layer, Mixing, NotBatchable, Pool, Sequence, Stand, Tape, layer_of
from fedtailor.strategy import trained
from fedtailor.tree import Params

KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: LINEAR, nn.Embedding: EMBEDDING, nn.LayerNorm: LAYER_NORM, nn.RMSNorm: RMS_NORM,
    nn.GroupNorm: GROUP_NORM, nn.Conv1d: CONVOLUTION, nn.Conv2d: CONVOLUTION, nn.Conv3d: CONVOLUTION,
}  # fmt: skip


class Folded(NamedTuple):
    """A model without weights of its own."""

    module: nn.Module
    layers: tuple[Layer, ...]
    tape: Tape
    half: bool = False  # whether it runs in bfloat16: weights, what they are given and gradients stay float32

    def run(self, params: Params, x: Tensor, clients: int) -> Tensor:
        """Outputs ``[K * B, ...]`` on ``x [K * B, ...]``; parameters are ``[K, ...]``, or ``[1, ...]`` where all share them."""
        self.tape.clients, self.tape.params, self.tape.calls = clients, params, []
        draws = self.tape.draws
        try:
            outputs = halved(self.module, x) if self.half else self.module(x)
        except RuntimeError as error:
            if not (self.tape.arranged and "view size is not compatible" in str(error)):
                raise
            self.tape.arranged, self.tape.draws = False, draws
            return self.run(params, x, clients)
        for call in self.tape.calls:
            if call.output._version != call.version:
                raise NotBatchable(f"{call.layer.name}: its output is changed in place")
        return outputs


def halved(module: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """A module's outputs, in float32, of products and convolutions in bfloat16."""
    with torch.autocast(inputs[0].device.type, torch.bfloat16, cache_enabled=False):
        return single(module(*inputs))


def single(x: Tensor) -> Tensor:
    """bfloat16 as float32, and anything else as it is."""
    return x.float() if x.dtype == torch.bfloat16 else x


def folded(recipe: Recipe, trains: Callable[[str], bool] = trained) -> Folded:
    """``recipe``'s model with each layer replaced by one that holds the clients' weights apart, unless it is frozen whole.

    Args:
        trains: whether local training moves a parameter, by its name; what does not move has no gradient.

    Raises:
        NotBatchable: naming the parameter, or the setting, that no layer here covers.
    """
    module, tape = recipe.model(), Tape()
    stands: dict[nn.Module, nn.Module] = {}
    owners: dict[int, str] = {}  # a parameter's identity, and whose it is
    layers: list[Layer] = []
    for name, part in module.named_modules():
        if part in stands:
            continue  # as a part of what stands for another
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            raise Mixing(f"{name}: {type(part).__name__} mixes the examples of a batch")
        if type(part) is nn.Dropout:
            stands[part] = Dropout(part.p, tape)
        if type(part) is nn.MaxPool2d and not part.return_indices:
            stands[part] = Pool(part)
        if type(part) is nn.Sequential:
            part.__class__ = Sequence
        if getattr(part, "inplace", False):
            part.inplace = False  # it would change what a gradient is taken of
        if (turned := attention.turned(part)) is not None:
            stands[part] = turned
        attends = type(part) is nn.MultiheadAttention  # and has its last linear layer's parameters, too
        named = {own: (f"{name}.{own}" if name else own, p) for own, p in part.named_parameters(recurse=attends)}
        if not any(p.requires_grad or is_part(full, SHIFT) for full, p in named.values()) and not _drops(part):
            continue
        for own, (_, p) in named.items():
            if owners.setdefault(id(p), name) != name:
                raise NotBatchable(f"{name}.{own}: the same parameter as one of {owners[id(p)]}")
            if (why := _unfit(part)) is not None:
                raise NotBatchable(f"{name}.{own}: a parameter of {type(part).__name__}{why}")
        if isinstance(part, nn.RNNBase):
            stands[part] = standing = recurrent.stand(name, part, tape, trains)
            layers += standing.layers
        elif isinstance(part, nn.MultiheadAttention):
            stands[part] = attending = attention.stand(name, part, tape, trains)
            stands[part.out_proj] = attending.out_proj
            layers += attending.layers
        elif named:
            layers.append(layer_of(name, part, KINDS[type(part)], named, trains))
            stands[part] = Stand(layers[-1], tape)
    return Folded(_replaced(module, stands), tuple(layers), tape)


def _drops(part: nn.Module) -> bool:
    """Whether a recurrent layer, or attention, drops something within itself, which is ours to choose."""
    return isinstance(part, nn.RNNBase | nn.MultiheadAttention) and part.dropout > 0


def _unfit(part: Any) -> str | None:
    """Why a layer with parameters has no batched form; None where it has one."""
    if type(part) not in KINDS and type(part) not in recurrent.CELLS and type(part) is not nn.MultiheadAttention:
        return ", which has no batched form"
    if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks:
        return " with hooks"
    if isinstance(part, nn.Embedding) and (part.max_norm is not None or part.scale_grad_by_freq):
        return " with max_norm or scale_grad_by_freq"
    if isinstance(part, nn.RNNBase):
        return " with proj_size" if part.proj_size else None
    if isinstance(part, nn.MultiheadAttention):
        return attention.unfit(part)
    return convolutions.unfit(part) if KINDS[type(part)] is CONVOLUTION else None


def _replaced(module: nn.Module, stands: dict[nn.Module, nn.Module]) -> nn.Module:
    """``module`` with every use of some of its parts replaced."""
    for part in list(module.modules()):
        for name, child in part._modules.items():
            part._modules[name] = child if child is None else stands.get(child, child)
    return stands.get(module, module)
