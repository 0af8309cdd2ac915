"""Low-rank adapters beside frozen linear layers. Hu et al. 2021, LoRA, https://arxiv.org/abs/2106.09685.

An adapted layer ``X`` computes ``base(x) + scale * (lora_b(lora_a(x)) + lora_shift(x))``. Its parameters are named by
what becomes of them: ``X.base.*`` is frozen and stays with the recipe; ``X.lora_a.weight [rank, in]`` and
``X.lora_b.weight [out, rank]`` are trained and travel; ``X.lora_shift.weight [out, in]``, which only an exact layer has,
travels to the sites and is moved by the server alone.
"""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from fedtailor import seeds
from fedtailor.errors import ConfigError
from fedtailor.tree import Params

LORA_A, LORA_B, SHIFT = "lora_a.weight", "lora_b.weight", "lora_shift.weight"


class Adapted(nn.Module):
    """A linear layer that is frozen, and its adapter."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, exact: bool) -> None:
        super().__init__()
        wide, high = base.in_features, base.out_features
        self.base, self.scale = base.requires_grad_(False), scale
        self.lora_a = nn.Linear(wide, rank, bias=False).to(base.weight)
        self.lora_b = _zero(nn.Linear(rank, high, bias=False).to(base.weight))  # the layer starts as its base
        self.lora_shift = (
            _zero(nn.Linear(wide, high, bias=False).to(base.weight)).requires_grad_(False) if exact else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        low: Tensor = self.lora_b(self.lora_a(x))
        if self.lora_shift is not None:
            low = low + self.lora_shift(x)
        out: Tensor = self.base(x) + self.scale * low
        return out


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    return layer


def adapted(
    module: nn.Module,
    rank: int,
    *,
    alpha: float | None = None,
    where: Sequence[str] = ("*",),
    exact: bool = False,
    key: str | None = None,
) -> nn.Module:
    """``module`` with an adapter on each linear layer whose name matches; it is changed in place.

    Nothing else is frozen: a normalisation or a head beside the adapters is trained and travels, unless the recipe sets
    its ``requires_grad`` to False.

    Args:
        alpha: an adapter's output is scaled by ``alpha / rank``; None: by 1.
        where: patterns of names of layers, as in ``layers.*``.
        exact: add a shift, for strategies that aggregate the products of adapters exactly.
        key: draw the frozen weights from this text alone, bit for bit alike on every machine. None: leave them as they
            are, which is for weights that the recipe has loaded: they must be the same at every site, every time.

    Raises:
        ConfigError: if no layer matches, or the rank is more than a layer has.
    """
    linear = {name: layer for name, layer in module.named_modules() if type(layer) is nn.Linear}
    chosen = {name: layer for name, layer in linear.items() if any(fnmatchcase(name, pattern) for pattern in where)}
    if not chosen:
        raise ConfigError(f"adapters: no linear layer matches {list(where)}; there are {sorted(linear)}")
    for name, base in chosen.items():
        most = min(base.in_features, base.out_features)
        if not 1 <= rank <= most:
            raise ConfigError(f"adapters: rank {rank} for layer {name!r}; it must be from 1 to {most}")
        if key is not None:
            _draw(base, key, name)
        layer = Adapted(base, rank, 1.0 if alpha is None else alpha / rank, exact)
        if not name:
            return layer
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, layer)
    return module


def _draw(layer: nn.Linear, key: str, name: str) -> None:
    bound = 1 / math.sqrt(layer.in_features)  # torch's own for a linear layer
    with torch.no_grad():
        for part, p in layer.named_parameters():
            number = torch.tensor(seeds.number(0, "base", key, name, part), device=p.device)
            p.copy_((2 * seeds.uniform(number, p.numel()).reshape(p.shape) - 1) * bound)


def is_part(name: str, part: str) -> bool:
    """Whether ``name`` is a layer's ``LORA_A``, ``LORA_B`` or ``SHIFT``.

    >>> is_part("layers.0.lora_a.weight", LORA_A), is_part("lora_a.weight", LORA_A), is_part("w", LORA_A)
    (True, True, False)
    """
    return f".{name}".endswith(f".{part}")


def layers(params: Params) -> list[str]:
    """What the names of each adapter begin with, by the names of its parts.

    >>> layers({"a.lora_a.weight": torch.ones(1, 2), "a.lora_b.weight": torch.ones(3, 1), "b.weight": torch.ones(1)})
    ['a.']
    """
    starts = [name.removesuffix(LORA_A) for name in params if is_part(name, LORA_A)]
    return [start for start in starts if start + LORA_B in params]


def merged(module: nn.Module, params: Params) -> Params:
    """The state dict of the plain model, its adapters folded into their layers: for use where nobody knows of adapters.

    Args:
        module: a fresh module of the recipe, which holds what is frozen.
        params: what the study made.
    """
    out = {name: x.detach() for name, x in module.state_dict().items()} | params
    for name, layer in module.named_modules():
        if isinstance(layer, Adapted):
            start = f"{name}." if name else ""
            own = {part.removeprefix(start): out.pop(part) for part in list(out) if part.startswith(start)}
            low = own[LORA_B] @ own[LORA_A] + own.get(SHIFT, 0)
            out[f"{start}weight"] = own["base.weight"] + layer.scale * low
            if "base.bias" in own:
                out[f"{start}bias"] = own["base.bias"]
    return out
