"""Gradients of a block of clients, from one forward pass and one backward pass over all their examples."""

from typing import NamedTuple

import torch
from torch import Tensor

from fedtailor import tree
from fedtailor.recipe import Recipe
from fedtailor.simulations.folded import Folded, Layer
from fedtailor.simulations.layers import beside, squared
from fedtailor.tree import Params, Tree

Uses = list[tuple[Tensor, Tensor]]  # of one layer: what it was given, and the gradient of what it made, of this shape


class Part(NamedTuple):
    """One layer's part of the gradient: to be made of its uses, or made already."""

    layer: Layer
    uses: Uses
    made: Params | None = None

    def gradient(self, clients: int) -> Params:
        """By the parameters' names in the model, leaves ``[K, ...]``."""
        return self.layer.named(_summed(self.layer, self.uses, clients) if self.made is None else self.made)


def mean_losses(recipe: Recipe, model: Folded, params: Params, batch: Tree) -> Tensor:
    """Each client's loss ``[K]``, as :func:`fedtailor.training.mean_loss` has it."""
    with torch.no_grad():
        each = _losses(recipe, model, params, batch).view(batch["live"].shape)
    total: Tensor = (each * batch["live"]).sum(1) * batch["scale"]
    return total


def plain(recipe: Recipe, model: Folded, params: Params, batch: Tree) -> list[Part]:
    """What :func:`fedtailor.training.plain` makes of each client, in parts."""
    weights = (batch["live"] * batch["scale"][:, None]).flatten()
    return [Part(layer, uses) for layer, uses in _uses(model, _losses(recipe, model, params, batch), weights)]


def clipped(recipe: Recipe, model: Folded, params: Params, batch: Tree, clip: float) -> list[Part]:
    """What :func:`fedtailor.training.clipped` makes of each client but for the noise, in parts.

    One backward pass suffices: an example's gradient is the product of what a layer was given and the gradient of what
    it made, so that the latter, scaled, gives the sum of clipped gradients.
    """
    clients, examples = batch["live"].shape
    uses = _uses(model, _losses(recipe, model, params, batch), torch.ones(()))
    made: dict[str, Params] = {}  # every example's gradient, of those layers where it costs less than its length alone
    squares: Tensor | float = 0.0
    for layer, use in uses:
        found = layer.kind.squares(layer.module, *use[0]) if len(use) == 1 else None
        if found is None:
            made[layer.name] = _summed(layer, use, clients * examples)
            found = torch.stack([squared(g.flatten(1)) for g in made[layer.name].values()]).sum(0)
        squares = squares + found
    assert isinstance(squares, Tensor), "a model has parameters"
    counts = squares.isfinite()  # as in tree.clip: an example that is not finite is nothing
    scale = torch.where(counts, (clip / (squares.clamp(min=0).sqrt() + 1e-12)).clamp(max=1.0), 0.0)
    scale = (
        (scale.view(clients, examples) * batch["live"] * batch["scale"][:, None]).flatten().to(uses[0][1][0][1].dtype)
    )
    gone = None if bool(counts.all()) else ~counts
    parts = []
    for layer, use in uses:
        if layer.name in made:
            each = {name: _without(g, gone) for name, g in made[layer.name].items()}
            parts.append(Part(layer, [], {name: _weighted(scale, g, clients) for name, g in each.items()}))
        else:
            scaled = [(_without(given, gone), _without(delta, gone) * beside(scale, delta)) for given, delta in use]
            parts.append(Part(layer, scaled))
    return parts


def whole(params: Params, parts: list[Part], clients: int) -> Params:
    """The gradient in the parameters' order, leaves ``[K, ...]``; a layer that was not used has none, and so zero."""
    found = {name: g for part in parts for name, g in part.gradient(clients).items()}
    return {
        name: found[name] if name in found else torch.zeros_like(p).expand(clients, *p.shape[1:])
        for name, p in params.items()
    }


def _losses(recipe: Recipe, model: Folded, params: Params, batch: Tree) -> Tensor:
    """``[K * B]``."""
    x, y = batch["x"], batch["y"]
    each: Tensor = recipe.losses(model.run(params, x.flatten(0, 1), len(x)), y.flatten(0, 1))
    return each


def _uses(model: Folded, losses: Tensor, weights: Tensor) -> list[tuple[Layer, Uses]]:
    """Every layer's uses in the last run, with gradients of the weighted sum of ``losses``."""
    weights = weights.to(losses.dtype).expand(losses.shape)
    calls = model.tape.calls
    deltas = torch.autograd.grad(losses, [call.output for call in calls], weights, allow_unused=True)
    found: dict[str, Uses] = {layer.name: [] for layer in model.layers}
    for call, delta in zip(calls, deltas, strict=True):
        if delta is not None:
            found[call.layer.name].append((call.given, delta))
    return [(layer, found[layer.name]) for layer in model.layers if found[layer.name]]


def _summed(layer: Layer, uses: Uses, clients: int) -> Params:
    first, *rest = (layer.kind.gradient(layer.module, given, delta, clients) for given, delta in uses)
    for more in rest:
        first = tree.map(torch.add, first, more)
    return first


def _weighted(scale: Tensor, each: Tensor, clients: int) -> Tensor:
    """``[K * B, ...]`` summed over each client's examples."""
    total = torch.bmm(scale.to(each.dtype).view(clients, 1, -1), each.view(clients, len(each) // clients, -1))
    return total.view(clients, *each.shape[1:])


def _without(x: Tensor, gone: Tensor | None) -> Tensor:
    """``x [K * B, ...]`` with some examples' rows zero: nought times NaN is NaN."""
    if gone is None or not x.is_floating_point():
        return x
    return x.masked_fill(gone.view(-1, *[1] * (x.dim() - 1)), 0.0)
