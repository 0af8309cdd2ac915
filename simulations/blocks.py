"""A block of clients trained as one batched computation: what ``local_train`` does under ``vmap``, without ``vmap``."""

from collections.abc import Callable

import torch
from torch import Tensor

from fedtailor import tree
from fedtailor.errors import ConfigError
from fedtailor.recipe import Recipe
from fedtailor.simulations import gradients
from fedtailor.simulations.descent import Descent
from fedtailor.simulations.engine import Many
from fedtailor.simulations.feed import NOTHING, Feed, Rooms
from fedtailor.simulations.folded import folded
from fedtailor.simulations.layers import beside
from fedtailor.strategy import Local, Strategy, WeightedChange
from fedtailor.training import NO_LOSS
from fedtailor.tree import Tree


def block_train(
    recipe: Recipe,
    strategy: Strategy,
    lr: float,
    clip: float | None = None,
    *,
    feed: Feed = NOTHING,
    together: bool = False,
) -> Many:
    """Build what ``vmapped(local_train(...))`` is, for a recipe whose model's layers all have a batched form.

    Args:
        clip: the bound of each example's gradient, with ``batches["noise"]``, if there is any; None: plain gradients.
        feed: where batches that name rows and seeds get examples and noise from.
        together: where the strategy adds up weighted changes, give the block's sum as one summand ``[1, ...]``: for who
            asks for no client's own. It is less work, much less where linear layers are large.

    Raises:
        NotBatchable: if a layer has no batched form; also by the result, if the model changes an activation in place.
        ConfigError: if the strategy needs a loss, which private training has none of.
    """
    if strategy.needs_loss and clip is not None:
        raise ConfigError(NO_LOSS)
    model = folded(recipe)
    corrects = strategy.correct is not Strategy._field_defaults["correct"]
    weighted = strategy.report if isinstance(strategy.report, WeightedChange) and strategy.reduce.is_sum else None
    weighted = weighted if together else None

    rooms: Rooms = {}

    def many(cast: Tree, memory: Tree, batches: Tree, live: Tensor, num_examples: Tensor) -> tuple[Tree, Tree]:
        clients, steps = live.shape
        known: Tree = {"memory": memory, "num_examples": num_examples, "num_steps": live.sum(1)}
        if "seed" in batches:
            known["seed"] = batches["seed"][:, 0]
        model.tape.seed, model.tape.draws = known.get("seed"), 0
        noisy = clip is not None and not {"noise", "noise_seed"}.isdisjoint(batches)
        thin = weighted is not None and not corrects and not noisy  # noise has no low rank
        descent = Descent(tree.at(cast["params"], None), steps, thin, rooms)
        if strategy.needs_loss:
            each = [
                gradients.mean_losses(recipe, model, descent.params, b) for b in feed.steps(batches, rooms, noisy=False)
            ]
            known["loss"] = (torch.stack(each, 1) * live).sum(1) / live.sum(1)
        correct = _over_clients(lambda grads, params, memory: strategy.correct(grads, params, cast, memory), clients)
        rates = (lr * live).unbind(1)
        for batch, rate in zip(feed.steps(batches, rooms, noisy), rates, strict=True):
            at = recipe, model, descent.params, batch
            parts = gradients.plain(*at) if clip is None else gradients.clipped(*at, clip)
            if corrects:
                grads = gradients.whole(descent.params, parts, clients)
                grads |= {n: torch.addcmul(grads[n], beside(batch.scale, x), x) for n, x in batch.noise.items()}
                descent.move(correct(grads, descent.explicit(clients), memory), rate)
            else:
                descent.step(parts, rate)
                descent.move(batch.noise, rate * batch.scale)
        if weighted is not None:
            number, others = _weigh(weighted, cast, known, clients, lr)
            return {"delta": descent.total(number, cast["params"])} | tree.map(lambda x: x.sum(0)[None], others), memory
        ended = known | {"params": descent.explicit(clients)}
        found = _over_clients(lambda one: _reported(strategy, Local(cast=cast, lr=lr, **one)), clients)(ended)
        return found["summand"], found["memory"]

    return many


def _reported(strategy: Strategy, local: Local) -> Tree:
    summand, memory = strategy.report(local)
    return {"summand": summand, "memory": memory}


def _weigh(weighted: WeightedChange, cast: Tree, known: Tree, clients: int, lr: float) -> tuple[Tensor, Tree]:
    """Each client's number ``[K]``, and what is beside it."""

    def weigh(known: Tree) -> Tree:
        number, others = weighted.weigh(Local(cast=cast, params={}, lr=lr, **known))
        return {"number": number, "others": others}

    found = _over_clients(weigh, clients)(known)
    return found["number"], found["others"]


def _over_clients(fn: Callable[..., Tree], clients: int) -> Callable[..., Tree]:
    """``fn`` of each client, from and to leaves ``[K, ...]``; for one client without the cost of ``vmap``."""
    if clients > 1:
        return torch.func.vmap(fn)
    return lambda *trees: tree.at(fn(*(tree.at(each, 0) for each in trees)), None)
