"""A block of clients trained as one batched computation: what ``local_train`` does under ``vmap``, without ``vmap``."""

from collections.abc import Callable

import torch
from torch import Tensor

from fedtailor import tree
from fedtailor.errors import ConfigError
from fedtailor.recipe import Recipe
from fedtailor.simulations.engine import Many
from fedtailor.simulations.feed import NOTHING, Feed
from fedtailor.simulations.folded import Folded, Layer, folded
from fedtailor.strategy import Local, Strategy
from fedtailor.training import NO_LOSS
from fedtailor.tree import Params, Tree


def block_train(
    recipe: Recipe, strategy: Strategy, lr: float, clip: float | None = None, *, feed: Feed = NOTHING
) -> Many:
    """Build what ``vmapped(local_train(...))`` is, for a recipe whose model's layers all have a batched form.

    Args:
        clip: the bound of each example's gradient, with ``batches["noise"]``; None: plain gradients.
        feed: where batches that name rows and seeds get examples and noise from.

    Raises:
        NotBatchable: if a layer has no batched form; also by the result, if the model changes an activation in place.
        ConfigError: if the strategy needs a loss, which private training has none of.
    """
    if strategy.needs_loss and clip is not None:
        raise ConfigError(NO_LOSS)
    model = folded(recipe)
    corrects = strategy.correct is not Strategy._field_defaults["correct"]

    def many(cast: Tree, memory: Tree, batches: Tree, live: Tensor, num_examples: Tensor) -> tuple[Tree, Tree]:
        clients, steps = live.shape
        seed = batches["seed"][:, 0] if "seed" in batches else None
        model.tape.seed, model.tape.draws = seed, 0
        params: Params = tree.at(cast["params"], None)
        known = {"memory": memory, "count": num_examples, "steps": live.sum(1)}
        if seed is not None:
            known["seed"] = seed
        if strategy.needs_loss:
            each = [_mean_losses(recipe, model, params, feed.step(batches, step)) for step in range(steps)]
            known["loss"] = (torch.stack(each, 1) * live).sum(1) / live.sum(1)
        correct = _over_clients(lambda g, p, m: strategy.correct(g, p, cast, m), clients)
        for step in range(steps):
            batch = feed.step(batches, step)
            grads = (
                _plain(recipe, model, params, batch) if clip is None else _clipped(recipe, model, params, batch, clip)
            )
            if corrects:
                grads = correct(grads, _expanded(params, clients), memory)
            params = tree.map(lambda p, g, rate=lr * live[:, step]: p - _beside(rate, g) * g, params, grads)

        def report(known: Tree) -> Tree:
            local = Local(
                cast,
                known["memory"],
                known["params"],
                known["count"],
                known["steps"],
                lr,
                known.get("seed"),
                known.get("loss"),
            )
            summand, kept = strategy.report(local)
            return {"summand": summand, "memory": kept}

        found = _over_clients(report, clients)(known | {"params": _expanded(params, clients)})
        return found["summand"], found["memory"]

    return many


def _beside(scale: Tensor, like: Tensor) -> Tensor:
    """``[K]`` as ``[K, 1, ...]``."""
    return scale.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def _expanded(params: Params, clients: int) -> Params:
    return {name: p.expand(clients, *p.shape[1:]) for name, p in params.items()}


def _over_clients(fn: Callable[..., Tree], clients: int) -> Callable[..., Tree]:
    """``fn`` of each client, from and to leaves ``[K, ...]``; for one client without the cost of ``vmap``."""
    if clients > 1:
        return torch.func.vmap(fn)
    return lambda *trees: tree.at(fn(*(tree.at(each, 0) for each in trees)), None)


def _losses(recipe: Recipe, model: Folded, params: Params, batch: Tree) -> Tensor:
    """``[K * B]``."""
    x, y = batch["x"], batch["y"]
    each: Tensor = recipe.losses(model.run(params, x.flatten(0, 1), len(x)), y.flatten(0, 1))
    return each


def _mean_losses(recipe: Recipe, model: Folded, params: Params, batch: Tree) -> Tensor:
    """Each client's loss ``[K]``, as :func:`fedtailor.training.mean_loss` has it."""
    with torch.no_grad():
        each = _losses(recipe, model, params, batch).view(batch["live"].shape)
    total: Tensor = (each * batch["live"]).sum(1) * batch["scale"]
    return total


def _plain(recipe: Recipe, model: Folded, params: Params, batch: Tree) -> Params:
    """What :func:`fedtailor.training.plain` makes of each client: leaves ``[K, ...]``."""
    weights = (batch["live"] * batch["scale"][:, None]).flatten()
    clients = len(batch["live"])
    uses = _uses(model, _losses(recipe, model, params, batch), weights)
    return _ordered(params, [layer.named(_summed(layer, use, clients)) for layer, use in uses])


def _clipped(recipe: Recipe, model: Folded, params: Params, batch: Tree, clip: float) -> Params:
    """What :func:`fedtailor.training.clipped` makes of each client: leaves ``[K, ...]``.

    One backward pass: an example's gradient is the product of what a layer was given and the gradient of what it made,
    so that the latter, scaled, gives the sum of clipped gradients.
    """
    clients, examples = batch["live"].shape
    uses = _uses(model, _losses(recipe, model, params, batch), None)
    made: dict[str, Params] = {}  # gradients of every example, of those layers where they are cheaper
    squares = torch.zeros(clients * examples, dtype=torch.double, device=batch["live"].device)
    for layer, use in uses:
        found = layer.kind.squares(layer.module, *use[0]) if len(use) == 1 else None
        if found is None:
            made[layer.name] = _summed(layer, use, clients * examples)
            lengths = [
                torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.double) for g in made[layer.name].values()
            ]
            found = torch.stack(lengths).square().sum(0)
        squares += found
    counts = squares.isfinite()  # as in tree.clip: what is not finite is nothing
    scale = torch.where(counts, (clip / (squares.clamp(min=0).sqrt() + 1e-12)).clamp(max=1.0), 0.0)
    scale = scale * batch["live"].flatten()
    gone = None if bool(counts.all()) else ~counts
    total = []
    for layer, use in uses:
        if layer.name in made:
            each = {name: _without(g, gone).view(clients, examples, -1) for name, g in made[layer.name].items()}
            own = {name: torch.bmm(scale.to(g.dtype).view(clients, 1, examples), g) for name, g in each.items()}
            own = {name: g.view(clients, *made[layer.name][name].shape[1:]) for name, g in own.items()}
        else:
            scaled = [(_without(given, gone), _without(delta, gone) * _beside(scale, delta)) for given, delta in use]
            own = _summed(layer, scaled, clients)
        total.append(layer.named(own))
    sums = _ordered(params, total)
    return tree.map(lambda g, n: (g + n) * _beside(batch["scale"], g), sums, batch["noise"])


Uses = list[tuple[Tensor, Tensor]]  # of one layer: what it was given, and the gradient of what it made


def _uses(model: Folded, losses: Tensor, weights: Tensor | None) -> list[tuple[Layer, Uses]]:
    """Every layer's uses in the last run, with gradients of the sum of ``losses``, weighted if there are weights."""
    weights = torch.ones_like(losses) if weights is None else weights.to(losses.dtype)
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


def _ordered(params: Params, parts: list[Params]) -> Params:
    """The gradients in the parameters' order; a layer that was not used has none, and so zero."""
    found = {name: g for part in parts for name, g in part.items()}
    return {name: found[name] if name in found else torch.zeros_like(p) for name, p in params.items()}


def _without(x: Tensor, gone: Tensor | None) -> Tensor:
    """``x [K * B, ...]`` with some examples' rows zero: nought times NaN is NaN."""
    if gone is None or not x.is_floating_point():
        return x
    return x.masked_fill(gone.view(-1, *[1] * (x.dim() - 1)), 0.0)
