"""Gradients of a block of clients, from one forward pass and one backward pass over all their examples."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedtailor import tree
from fedtailor.recipe import Recipe
from fedtailor.simulations.feed import Batch
from fedtailor.simulations.folded import Folded, single
from fedtailor.simulations.layers import LINEAR, beside, positions, squared
from fedtailor.simulations.stands import Layer, Tape
from fedtailor.tree import Params

Uses = list[tuple[Tensor, Tensor]]  # of one layer: what it was given, and the gradient of what it made, of this shape


class Part(NamedTuple):
    """One layer's part of the gradient: to be made of its uses, or made already."""

    layer: Layer
    uses: Uses
    made: Params | None = None

    def gradient(self, clients: int) -> Params:
        """By the parameters' names in the model, leaves ``[K, ...]``."""
        return self.layer.named(_summed(self.layer, self.uses, clients) if self.made is None else self.made)


def mean_losses(recipe: Recipe, model: Folded, params: Params, batch: Batch) -> Tensor:
    """Each client's loss ``[K]``, as :func:`fedtailor.training.mean_loss` has it."""
    with torch.no_grad():
        return (_losses(recipe, model, params, batch) * batch.weights).view(len(batch.scale), -1).sum(1)


def plain(recipe: Recipe, model: Folded, several: Sequence[Params], batch: Batch) -> list[list[Part]]:
    """What :func:`fedtailor.training.plain` makes of each client, in parts: of one set of parameters or more."""
    uses = [_uses(model, _losses(recipe, model, params, batch), batch.weights) for params in several]
    return [[Part(layer, use) for layer, use in one] for one in uses]


def clipped(recipe: Recipe, model: Folded, several: Sequence[Params], batch: Batch, clip: float) -> list[list[Part]]:
    """What :func:`fedtailor.training.clipped` makes of each client but for the noise, in parts.

    An example's gradients under several sets of parameters are clipped together. One backward pass suffices for each:
    such a gradient is the product of what a layer was given and the gradient of what it made, so that the latter, scaled,
    gives the sum of clipped gradients.
    """
    ones = torch.ones_like(batch.weights)
    uses = [_uses(model, _losses(recipe, model, params, batch), ones) for params in several]
    made: list[dict[str, Params]] = [{} for _ in uses]  # examples' gradients, where they cost less than their lengths
    lengths = [_squares(layer, use, own) for one, own in zip(uses, made, strict=True) for layer, use in one]
    squares, gone = torch.stack(lengths).sum(0), None
    if _odd(model.tape, squares.sum()):  # seldom, and so worth a second look: some may overflow float32 only
        lengths = [
            _squares(layer, [(_double(a), b.double()) for a, b in use], {}) for one in uses for layer, use in one
        ]
        squares = torch.stack(lengths).sum(0)
        gone = ~squares.isfinite()  # as in tree.clip: an example that is not finite is nothing
        squares = squares.masked_fill(gone, 0.0)
    scale = (clip / (squares.sqrt() + 1e-12)).clamp_(max=1.0) * batch.weights
    return [
        [_scaled(layer, use, own.get(layer.name), scale, gone, len(batch.scale)) for layer, use in one]
        for one, own in zip(uses, made, strict=True)
    ]


def waits(x: Tensor) -> bool:
    """Whether to look at a number of the device's in every step; a GPU would wait for it."""
    return x.device.type == "cpu"


def _odd(tape: Tape, total: Tensor) -> bool:
    """Whether lengths need the second look; where that is not known yet, ``tape.odd`` keeps what will tell."""
    if tape.careful or (tape.looks and waits(total)):
        return tape.careful or not math.isfinite(float(total))
    tape.odd = total if tape.odd is None else tape.odd + total
    return False


def _scaled(layer: Layer, uses: Uses, made: Params | None, scale: Tensor, gone: Tensor | None, clients: int) -> Part:
    """A layer's part, each example's share scaled by ``scale [K * B]``, and without those that are ``gone``."""
    if made is not None:
        return Part(layer, [], {name: _weighted(scale, _without(g, gone), clients) for name, g in made.items()})
    return Part(layer, [(_without(a, gone), _without(b, gone) * beside(scale, b)) for a, b in uses])


def _squares(layer: Layer, uses: Uses, made: dict[str, Params]) -> Tensor:
    """The squared lengths ``[K * B]`` of every example's gradient, which is put into ``made`` where it is made for them."""
    found = layer.kind.squares(layer.module, *uses[0]) if len(uses) == 1 else None
    if found is None:
        made[layer.name] = _summed(layer, uses, len(uses[0][1]))
        found = torch.stack([squared(_stored(g)) for g in made[layer.name].values()]).sum(0)
    return found


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def whole(params: Params, parts: list[Part], clients: int) -> Params:
    """The gradient in the parameters' order, leaves ``[K, ...]``; a layer that was not used has none, and so zero."""
    found = {name: g for part in parts for name, g in part.gradient(clients).items()}
    return {
        name: found[name] if name in found else torch.zeros_like(p).expand(clients, *p.shape[1:])
        for name, p in params.items()
    }


def _losses(recipe: Recipe, model: Folded, params: Params, batch: Batch) -> Tensor:
    """``[K * B]``."""
    each: Tensor = recipe.losses(model.run(params, batch.x, len(batch.scale)), batch.y)
    return each


def _uses(model: Folded, losses: Tensor, weights: Tensor) -> list[tuple[Layer, Uses]]:
    """Every layer's uses in the last run, with gradients of the weighted sum of ``losses``."""
    calls = model.tape.calls
    deltas = torch.autograd.grad(losses, [call.output for call in calls], weights.to(losses.dtype), allow_unused=True)
    found: dict[str, Uses] = {layer.name: [] for layer in model.layers}
    for call, delta in zip(calls, deltas, strict=True):
        if delta is not None:
            use = (single(call.given), single(delta)) if model.half else (call.given, delta)
            found[call.layer.name].append(use)
    return [(layer, _together(layer, found[layer.name])) for layer in model.layers if found[layer.name]]


def _together(layer: Layer, uses: Uses) -> Uses:
    """A linear layer's uses as one: each example's positions are those of all of them."""
    if layer.kind is not LINEAR or len(uses) == 1:
        return uses
    return [tuple(torch.cat([positions(x, len(x)) for x in each], 1) for each in zip(*uses, strict=True))]  # type: ignore[list-item]


def _summed(layer: Layer, uses: Uses, clients: int) -> Params:
    first, *rest = (layer.kind.gradient(layer.module, given, delta, clients) for given, delta in uses)
    for more in rest:
        first = tree.map(torch.add, first, more)
    return first


def _weighted(scale: Tensor, each: Tensor, clients: int) -> Tensor:
    """``[K * B, ...]`` summed over each client's examples."""
    stored = _stored(each)
    total = torch.bmm(scale.to(each.dtype).view(clients, 1, -1), stored.view(clients, len(each) // clients, -1))
    return total.as_strided((clients, *each.shape[1:]), (stored.shape[1], *each.stride()[1:]))


def _stored(each: Tensor) -> Tensor:
    """Every row's numbers ``[K * B, N]`` in the order in which they lie, which may be that of images' channels."""
    number = each.numel() // len(each)
    assert each.stride(0) == number, "made by a product, and so without gaps"
    return each.as_strided((len(each), number), (number, 1))


def _without(x: Tensor, gone: Tensor | None) -> Tensor:
    """``x [K * B, ...]`` with some examples' rows zero: nought times NaN is NaN."""
    if gone is None or not x.is_floating_point():
        return x
    return x.masked_fill(gone.view(-1, *[1] * (x.dim() - 1)), 0.0)
