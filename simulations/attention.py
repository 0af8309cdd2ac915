"""Attention by heads: linear layers of all positions at once, and between them what has no weights."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fedtailor.simulations.layers import LINEAR, Kind, squared
from fedtailor.simulations.stands import Dropout, Layer, NotBatchable, Stand, Tape, layer_of
from fedtailor.tree import Params

SETTINGS = (
    "embed_dim",
    "kdim",
    "vdim",
    "num_heads",
    "head_dim",
    "dropout",
    "batch_first",
    "bias_k",
    "bias_v",
    "add_zero_attn",
    "_qkv_same_embed_dim",
)
PACKED, APART, SHIFTS, OUT = "in_proj", ("q_proj", "k_proj", "v_proj"), "in_proj_bias", "out_proj"  # layers


class Attention(nn.Module):
    """Stands for ``nn.MultiheadAttention``, gives what it gives and has its settings."""

    batch_first: bool
    dropout: float
    head_dim: int
    num_heads: int
    in_proj_bias: None = None  # an encoder's layer that is not being trained looks here before it goes past us

    def __init__(self, module: nn.MultiheadAttention, layers: dict[str, Layer], tape: Tape) -> None:
        super().__init__()
        for name in SETTINGS:
            setattr(self, name, getattr(module, name))
        self.layers = list(layers.values())
        self.stands = {place: Stand(layer, tape) for place, layer in layers.items()}
        self.out_proj = self.stands.pop(OUT)
        self.chosen = Dropout(module.dropout, tape)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As the module's own; batches of sequences only."""
        given = query, key, value
        if any(x.is_nested or x.dim() != 3 for x in given):
            raise NotBatchable("MultiheadAttention: not a batch of sequences of one length")
        heads = self.num_heads, self.head_dim
        q, k, v = (x.reshape(*x.shape[:2], *heads).transpose(1, 2) for x in self._projected(given))
        if need_weights or self.dropout > 0:
            weights = self.chosen(_weights(q, k, self._mask(attn_mask, key_padding_mask, q), safe=not need_weights))
            made = weights @ v
        else:
            causal = is_causal and key_padding_mask is None  # then that says all that the mask does
            mask = None if causal else self._mask(attn_mask, key_padding_mask, q)
            made = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        z = self.out_proj(made.transpose(1, 2).flatten(2))
        z = z if self.batch_first else z.transpose(0, 1)
        if not need_weights:
            return z, None
        return z, weights.mean(1) if average_attn_weights else weights

    def _projected(self, given: tuple[Tensor, ...]) -> list[Tensor]:
        """Queries, keys and values ``[N, L or S, E]``.

        Weights in one parameter are one layer, used once of each different input, though not all it makes is needed: so
        its gradient and the lengths of its examples' are right whichever inputs are the same.
        """
        each = {id(x): x if self.batch_first else x.transpose(0, 1) for x in given}
        if PACKED in self.stands:
            made = {which: self.stands[PACKED](x).chunk(3, -1) for which, x in each.items()}
            return [made[id(x)][number] for number, x in enumerate(given)]
        found = [self.stands[place](each[id(x)]) for place, x in zip(APART, given, strict=True)]
        if SHIFTS not in self.stands:
            return found
        shifts = self.stands[SHIFTS](found[0]).chunk(3, -1)
        return [x + shift[:, None] for x, shift in zip(found, shifts, strict=True)]

    def _mask(self, mask: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
        """What is added to scores ``[N, H, L, S]``.

        Args:
            mask: ``[L, S]`` or ``[N * H, L, S]``.
            padding: ``[N, S]``.
        """
        found = None if padding is None else _added(padding, like)[:, None, None]
        if mask is None:
            return found
        heads = self.num_heads if mask.dim() == 3 else 1
        mask = _added(mask, like).view(-1, heads, *mask.shape[-2:])
        return mask if found is None else mask + found


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as what is added: minus infinity where it is true, if it is of truths."""
    if mask.is_floating_point():
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, *, safe: bool) -> Tensor:
    """``[N, H, L, S]``.

    Args:
        safe: whether a position that may attend to nothing does so, rather than have weights that are not numbers: torch
            does the one unless it is asked for weights.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if mask is None:
        return torch.softmax(scores, -1)
    if not safe:
        return torch.softmax(scores + mask, -1)
    nothing = mask.isneginf().all(-1, keepdim=True)
    return torch.softmax((scores + mask).masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)


def _shifts(layer: None, weights: Params, x: Tensor, clients: int) -> tuple[Tensor, Tensor]:
    bias = weights["weight"]
    z = bias.repeat_interleave(len(x) // len(bias), 0)
    return z, z.detach()


def _shifts_gradient(layer: None, given: Tensor, delta: Tensor, clients: int) -> Params:
    return {"weight": delta.reshape(clients, -1, delta.shape[-1]).sum(1)}


BIAS = Kind(_shifts, _shifts_gradient, lambda layer, given, delta: squared(delta))
"""A bias of several linear layers: it makes every example's own ``[K * B, P]``, whose gradient counts all positions."""


def stand(name: str, module: nn.MultiheadAttention, tape: Tape, trains: Callable[[str], bool]) -> Attention:
    """Attention as linear layers: one of all three inputs, or one of each and their bias, and one of what comes out."""
    place, own = f"{name}." if name else "", dict(module.named_parameters())

    def named(**names: str) -> dict[str, tuple[str, nn.Parameter]]:
        return {each: (f"{place}{which}", own[which]) for each, which in names.items() if which in own}

    def linear(which: str, weight: str, bias: str = "") -> Layer:
        outputs, inputs = own[weight].shape
        plain = nn.Linear(inputs, outputs, bias in own, device="meta")
        return layer_of(f"{place}{which}", plain, LINEAR, named(weight=weight, bias=bias), trains)

    if module._qkv_same_embed_dim:
        layers = {PACKED: linear(PACKED, "in_proj_weight", "in_proj_bias")}
    else:
        layers = {which: linear(which, f"{which}_weight") for which in APART}
        if "in_proj_bias" in own:
            layers[SHIFTS] = layer_of(f"{place}{SHIFTS}", None, BIAS, named(weight="in_proj_bias"), trains)
    return Attention(module, layers | {OUT: linear(OUT, "out_proj.weight", "out_proj.bias")}, tape)


def unfit(module: nn.MultiheadAttention) -> str | None:
    """Why attention has no batched form; None where it has one."""
    if module.bias_k is not None:
        return " with add_bias_kv"
    if module.add_zero_attn:
        return " with add_zero_attn"
    out = module.out_proj
    plain = type(out) in (NonDynamicallyQuantizableLinear, nn.Linear) and not out._forward_pre_hooks
    return None if plain else " whose out_proj is no plain linear layer"


class Turned(nn.Module):
    """A part of a transformer made for sequences ``[L, N, E]`` that runs on ``[N, L, E]``: clients lie along one axis."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.number = module, TRANSFORMERS[type(module)]

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """As the module's own."""
        first = [x.transpose(0, 1) for x in inputs[: self.number]]
        named = {name: x.transpose(0, 1) if name in SEQUENCES else x for name, x in named.items()}
        z: Tensor = self.module(*first, *inputs[self.number :], **named)
        return z.transpose(0, 1)


SEQUENCES = ("src", "tgt", "memory")  # by these names, or by number the first
TRANSFORMERS: dict[type[nn.Module], int] = {
    nn.TransformerEncoder: 1, nn.TransformerEncoderLayer: 1, nn.TransformerDecoder: 2, nn.TransformerDecoderLayer: 2,
}  # fmt: skip


def turned(module: nn.Module) -> Turned | None:
    """What stands for a transformer's part whose batch is its second axis, which is changed; None for anything else.

    Its linear layers and normalisations would take that axis for one of positions.
    """
    parts = [part for part in module.modules() if isinstance(part, nn.MultiheadAttention)]
    if type(module) not in TRANSFORMERS or any(part.batch_first for part in parts):
        return None
    for part in parts:
        part.batch_first = True
    return Turned(module)
