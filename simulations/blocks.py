"""A block of clients trained as one batched computation: what ``local_train`` does under ``vmap``, without ``vmap``."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedtailor import tree
from fedtailor.errors import ConfigError
from fedtailor.optimizers import SGD, Optimizer
from fedtailor.recipe import Recipe
from fedtailor.simulations import gradients
from fedtailor.simulations.descent import Descent
from fedtailor.simulations.engine import Many
from fedtailor.simulations.feed import DRAWN, NOTHING, Batch, Feed, Rooms, parting
from fedtailor.simulations.folded import folded
from fedtailor.simulations.gradients import Part
from fedtailor.simulations.graphs import Replay, plainly
from fedtailor.simulations.layers import LINEAR, beside
from fedtailor.simulations.spanned import EXAMINED, examined, first_of
from fedtailor.simulations.stands import Tape
from fedtailor.strategy import Local, Strategy, WeightedChange
from fedtailor.training import NO_LOSS, parted
from fedtailor.tree import Params, Tree


def block_train(
    recipe: Recipe,
    strategy: Strategy,
    lr: float,
    clip: float | None = None,
    *,
    feed: Feed = NOTHING,
    together: bool = False,
    half: bool = False,
    replay: Replay = plainly,
    optimizer: Optimizer = SGD,
) -> Many:
    """Build what ``vmapped(local_train(...))`` is, for a recipe whose model's layers all have a batched form.

    Args:
        clip: the bound of each example's gradient, with ``batches["noise"]``, if there is any; None: plain gradients.
        feed: where batches that name rows and seeds get examples and noise from.
        together: where the strategy adds up weighted changes, give the block's sum as one summand ``[1, ...]``: for who
            asks for no client's own. It is less work, much less where linear layers are large.
        half: run the model in bfloat16. Losses, every gradient's length, what is added up and the weights are float32.
        replay: see :mod:`fedtailor.simulations.graphs`.
        optimizer: makes steps of gradients; what it keeps begins anew.

    Raises:
        NotBatchable: if a layer has no batched form; also by the result, if the model changes an activation in place.
        ConfigError: if the strategy needs a loss, which private training has none of.
    """
    if strategy.needs_loss and clip is not None:
        raise ConfigError(NO_LOSS)
    model, defaults = folded(recipe, strategy.trains)._replace(half=half), Strategy._field_defaults
    starts, corrects = strategy.start is not defaults["start"], strategy.correct is not defaults["correct"]
    whole = corrects or not optimizer.plain  # whether somebody asks for gradients
    change = strategy.report if isinstance(strategy.report, WeightedChange) else None
    weighted = change if together and strategy.reduce.is_sum else None
    spans = weighted is not None and not whole and not starts and clip is None
    first, examples, even = first_of(recipe.model()) if spans else None, Rooms(), replay is not plainly
    opening = next((layer for layer in model.layers if layer.name == first and layer.kind is LINEAR), None)

    def trained(sets: dict[str, Descent], batch: Batch) -> list[list[Part]]:
        at = recipe, model, [each.params for each in sets.values()], batch
        return gradients.plain(*at) if clip is None else gradients.clipped(*at, clip)

    def once(
        rooms: Rooms, careful: bool, looks: bool, cast: Tree, memory: Tree, batches: Tree, live: Tensor, counts: Tensor
    ) -> Tree:
        model.tape.careful, model.tape.looks, model.tape.odd = careful, looks, None
        clients, steps = live.shape
        known: Tree = {"memory": memory, "num_examples": counts, "num_steps": live.sum(1)}
        if "seed" in batches:
            known["seed"] = batches["seed"][:, 0]
        model.tape.seed, model.tape.draws = known.get("seed"), 0
        shared: Params = tree.at(cast["params"], None)
        if strategy.needs_loss:
            fed = feed.steps(batches, rooms, noisy=False)
            losses = torch.stack([gradients.mean_losses(recipe, model, shared, batch) for batch in fed], 1)
            known["loss"] = (losses * live).sum(1) / live.sum(1)
        noisy = clip is not None and not {"noise", "noise_seed", DRAWN}.isdisjoint(batches)
        begin = _over_clients(lambda known: strategy.start(cast, known["memory"]), clients)
        start = begin(known) if starts else shared
        thin = weighted is not None and not whole and not noisy  # noise has no low rank
        kept = None if weighted is None else rooms
        how: tuple[Any, ...] = not starts, thin, kept, optimizer
        sets = {name: Descent(params, steps, *how) for name, params in _sets(start).items()}
        corrected = _over_clients(lambda grads, params, memory: strategy.correct(grads, params, cast, memory), clients)
        rate, apart = lr * live, parting(feed.shapes(batches))
        if not whole:
            instead = None
            if opening is not None and EXAMINED in batches:
                instead = sets[""].span(opening, feed.form(batches)[0], batches[EXAMINED])
            for batch in feed.steps(batches, rooms, noisy, rate, instead):
                for each, own in zip(sets.values(), trained(sets, batch), strict=True):
                    each.step(own, clients, batch.x)
                if batch.noise is not None:
                    for name, drawn in _sets(apart(batch.noise)).items():
                        sets[name].stray(drawn, batch.scale, strategy.trains)
        else:
            for step, batch in enumerate(feed.steps(batches, rooms, noisy)):
                parts = zip(sets.items(), trained(sets, batch), strict=True)
                grads = _one(
                    {
                        name: gradients.whole(parted(each.params, strategy.trains)[0], own, clients)
                        for (name, each), own in parts
                    }
                )
                if batch.noise is not None:
                    drawn = apart(batch.noise)
                    grads = tree.map(lambda g, n, b=batch: torch.addcmul(g, beside(b.scale, g), n), grads, drawn)
                if corrects:
                    grads = corrected(
                        grads, _one({name: each.explicit(clients) for name, each in sets.items()}), memory
                    )
                for name, gradient in _sets(grads).items():
                    sets[name].move(gradient, rate[:, step], step)
        if weighted is not None:
            number, others = _weigh(weighted, cast, known, clients, lr)
            delta = sets[""].total(number, cast["params"])
            summand = {"delta": delta} | tree.map(lambda x: x.sum(0)[None], others)
            return {"summand": summand, "memory": memory} | _odd(model.tape)
        ends = {name: each.explicit(clients) for name, each in sets.items()}
        if change is not None and "" in ends:  # what its call does, of all clients without the cost of ``vmap``
            number, others = _weigh(change, cast, known, clients, lr)
            delta = tree.map(lambda end, start: (end - start) * beside(number, end), ends[""], cast["params"])
            return {"summand": {"delta": delta} | others, "memory": memory} | _odd(model.tape)
        ended = known | {"params": _one(ends)}
        found = _over_clients(lambda one: _reported(strategy, Local(cast=cast, lr=lr, **one)), clients)(ended)
        return found | _odd(model.tape)

    step, careful = replay(lambda looks: partial(once, {}, False, looks)), partial(once, {}, True, True)

    def many(cast: Tree, memory: Tree, batches: Tree, *rest: Any) -> tuple[Tree, Tree]:
        if opening is not None:  # outside of what may be recorded or compiled, which looks at no rows
            start = cast["params"][opening.full("weight")]
            batches = examined(start, feed, batches, examples, even)
        given = cast, memory, batches, *rest
        found = step(*given)
        if "odd" in found and not math.isfinite(float(found["odd"])):
            found = careful(*given)  # all steps again, with a second look in each
        return found["summand"], found["memory"]

    return many


def _odd(tape: Tape) -> Tree:
    return {} if tape.odd is None else {"odd": tape.odd}


def _sets(params: Tree) -> dict[str, Tree]:
    """The sets of parameters that are trained at once, by name: one, without a name, or several."""
    return params if any(isinstance(each, dict) for each in params.values()) else {"": params}


def _one(sets: dict[str, Tree]) -> Tree:
    """The inverse of :func:`_sets`."""
    return sets.get("", sets)


def _reported(strategy: Strategy, local: Local) -> Tree:
    summand, memory = strategy.report(local)
    return {"summand": summand, "memory": memory}


def _weigh(weighted: WeightedChange, cast: Tree, known: Tree, clients: int, lr: float) -> tuple[Tensor, Tree]:
    """Each client's number ``[K]``, and what is beside it."""

    def weigh(known: Tree) -> Tree:
        number, others = weighted.weigh(Local(cast=cast, params={}, lr=lr, **known))
        return {"number": number, "others": others}

    found = weigh(known) if weighted.many else _over_clients(weigh, clients)(known)
    return found["number"], found["others"]


def _over_clients(fn: Callable[..., Tree], clients: int) -> Callable[..., Tree]:
    """``fn`` of each client, from and to leaves ``[K, ...]``; for one client without the cost of ``vmap``."""
    if clients > 1:
        return torch.func.vmap(fn)
    return lambda *trees: tree.at(fn(*(tree.at(each, 0) for each in trees)), None)
