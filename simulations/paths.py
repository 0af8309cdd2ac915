"""Which way a block of clients is trained: one batched computation, ``vmap`` of one client's training, or a loop."""

import math
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedtailor import tree
from fedtailor.config import BlockPath
from fedtailor.errors import ConfigError
from fedtailor.optimizers import SGD, Optimizer
from fedtailor.recipe import Recipe, losses
from fedtailor.simulations.blocks import block_train
from fedtailor.simulations.engine import Many, looped, vmapped
from fedtailor.simulations.feed import Feed
from fedtailor.simulations.graphs import Replay, plainly
from fedtailor.simulations.hardware import drawn
from fedtailor.simulations.precision import half_losses
from fedtailor.simulations.spanned import fewer, first_of, size, worthwhile
from fedtailor.simulations.stands import Mixing, NotBatchable
from fedtailor.strategies import fedavg
from fedtailor.strategy import Strategy, WeightedChange
from fedtailor.training import clipped, local_train, plain
from fedtailor.tree import Params, Tree

CACHE = 3 << 21  # bytes of clients' own weights at once: more leave a processor's caches between a step and the next
ROOM = 1 << 28  # bytes of clients' examples and their products at once


class Task(NamedTuple):
    """What is to be trained."""

    recipe: Recipe
    strategy: Strategy
    lr: float
    clip: float | None
    feed: Feed
    block: int  # clients at once, at most
    together: bool  # whether nobody asks for one client's summand
    half: bool = False  # whether models run in bfloat16
    replay: Replay = plainly  # of blocks
    optimizer: Optimizer = SGD


class Round(NamedTuple):
    """One round's input, to try a way on."""

    cast: Tree
    memory: Tree
    batches: Tree
    live: Tensor
    num_examples: Tensor

    def of(self, clients: int, steps: int) -> "Round":
        """A part of it."""
        part = slice(0, clients)
        batches = tree.map(lambda x: x[part, :steps] if x.dim() > 1 else x[part], self.batches)
        return Round(self.cast, tree.at(self.memory, part), batches, self.live[part, :steps], self.num_examples[part])


class Way(NamedTuple):
    """How blocks are trained, and why so."""

    many: Many
    path: str  # block, loop or vmap
    block: int
    why: str = ""
    seconds: dict[str, float] = {}  # noqa: RUF012  # a client's two steps, of each way that was measured


def choose(path: BlockPath, task: Task, first: Round) -> Way:
    """The way that ``path`` asks for.

    ``auto`` goes by what the model is made of and never by the clock, so that a run repeats bit for bit. Where the model
    has no batched form, or gives another result in it, it is ``vmap``, and ``why`` says so. It is ``loop`` where that
    fails, and where examples are mixed, because a batch's padding then shows: in a loop there is no more of it than a
    site has.
    ``measure`` takes the fastest of all ways on two steps of the first block; ways differ in rounding.

    Raises:
        ConfigError: if ``path`` asks for what the model does not bear, or one client cannot train it.
    """
    if path in ("vmap", "loop"):
        way = forced(path, task)
        if (error := _fails(way, first)) is not None:
            raise ConfigError(
                f"simulation.path: {path}, but the model fails in it: {error}; auto looks for another way"
            )
        return way
    why = unfit(task, first)
    if path == "block":
        if why is not None:
            raise ConfigError(f"simulation.path: block, but {why.why}; auto falls back on vmap or a loop")
        return forced(path, task)
    if path == "auto":
        return _block(task, sensible(task, first)) if why is None else _otherwise(task, first, why)
    return _fastest(task, first, why)


def forced(path: str, task: Task) -> Way:
    """Exactly this way, without a trial."""
    if path == "block":
        return _block(task, task.block, "asked for")
    return _vmap(task, "asked for") if path == "vmap" else _loop(task, "asked for")


def check_half(way: Way, first: Round) -> None:
    """Try a step in bfloat16.

    Raises:
        ConfigError: if some operation of the model is not to be had in it.
    """
    try:
        way.many(*first.of(2, 1))
    except Exception as error:  # whatever a model's code, or torch under vmap, does not do with two kinds of numbers
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"simulation.precision: bf16, but the model fails in it by way of {way.path}: {why}; use float32"
        ) from error


class Unfit(NamedTuple):
    """Why a model cannot be batched."""

    why: str
    mixes: bool = False  # whether its outputs for an example seem to depend on the others of a batch


def unfit(task: Task, first: Round) -> Unfit | None:
    """Why a model cannot be batched; None where it can, and two clients' two steps agree with one at a time."""
    recipe = task.recipe._replace(model=lambda: _without_dropout(task.recipe.model()))
    trial = first.of(2, 2)
    cast, nothing = {"params": first.cast["params"]}, Tree()
    batches = Feed(task.feed.data).all({k: v for k, v in trial.batches.items() if k not in ("noise", "noise_seed")})
    size = batches["live"].shape[:2]
    batches |= {
        "live": torch.ones_like(batches["live"]),
        "noise": tree.map(lambda p: p.new_zeros(()).expand(*size, *p.shape), cast["params"]),
    }
    inputs = cast, nothing, batches, torch.ones_like(trial.live), trial.num_examples
    strategy = fedavg()._replace(trains=task.strategy.trains)
    try:
        many = block_train(recipe, strategy, task.lr, task.clip)
        before = drawn(first.live.device)
        found = many(*inputs)[0]["delta"]
        if not torch.equal(before, drawn(first.live.device)):
            return Unfit("the model draws random numbers that no seed of a client is behind")
    except NotBatchable as error:
        return Unfit(str(error), isinstance(error, Mixing))
    except Exception as error:  # whatever a model's code does that clients folded into the batch cannot
        return Unfit(f"with clients folded into the batch it fails: {type(error).__name__}: {error}")
    with warnings.catch_warnings(action="ignore"):  # that torch has no batching rule for this or that, and is slow
        try:
            alone = looped(_train(task._replace(half=False, optimizer=SGD), recipe, strategy))(*inputs)[0]["delta"]
        except RuntimeError as error:
            raise ConfigError(_impossible(task, str(error))) from error
    for name, expected in alone.items():
        a, b = found[name].nan_to_num(), expected.nan_to_num()
        if (a - b).norm() > 1e-2 * b.norm() + 1e-6:
            why = f"with clients folded into the batch, {name} learns something else: does the model mix examples?"
            return Unfit(why, mixes=True)
    return None


def _fails(way: Way, first: Round) -> str | None:
    """How two clients' two steps fail this way; None where they do not."""
    with warnings.catch_warnings(action="ignore"):  # that torch has no batching rule for this or that, and is slow
        try:
            way.many(*first.of(2, 2))
        except Exception as error:  # whatever a model's code does that this way does not bear
            return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def sensible(task: Task, first: Round) -> int:
    """Clients at once: all, but on a CPU only as many as whose own weights stay in its cache."""
    noisy = "noise" in first.batches or "noise_seed" in first.batches
    weighted = isinstance(task.strategy.report, WeightedChange) and task.strategy.reduce.is_sum
    whole = task.strategy.correct is not Strategy._field_defaults["correct"] or not task.optimizer.plain
    starts = task.strategy.start is not Strategy._field_defaults["start"]
    thin = task.together and weighted and not whole and not starts and not noisy
    params: Params = first.cast["params"]
    all_steps, clients = first.batches["live"][0].numel(), len(first.live)
    own = {name: p for name, p in params.items() if not (thin and p.dim() == 2 and fewer(all_steps, p))}
    most, name = clients, f"{first_of(task.recipe.model())}.weight" if thin and task.clip is None else ""
    if name in params and (places := worthwhile(params[name], task.feed, first.batches)) is not None:
        own.pop(name, None)
        most = ROOM // size(params[name], places.many)
    each = sum(p.numel() * p.element_size() for p in own.values())
    most = max(1, min(most, CACHE // max(each, 1)))
    if most >= clients or any(p.device.type != "cpu" for p in params.values()):
        return task.block
    return min(task.block, math.ceil(clients / math.ceil(clients / most)))  # blocks of about one size


def _train(task: Task, recipe: Recipe, strategy: Strategy) -> Callable[..., tuple[Tree, Tree]]:
    each = half_losses(recipe) if task.half else losses(recipe)
    return local_train(
        plain(each) if task.clip is None else clipped(each, task.clip),
        strategy,
        task.lr,
        each if task.clip is None else None,
        optimizer=task.optimizer,
    )


def _spelt_out(many: Many, feed: Feed) -> Many:
    return lambda cast, memory, batches, live, counts: many(cast, memory, feed.all(batches), live, counts)


def _vmap(task: Task, why: str) -> Way:
    many = vmapped(_train(task, task.recipe, task.strategy))
    return Way(_spelt_out(many, task.feed), "vmap", task.block, why)


def _loop(task: Task, why: str) -> Way:
    many = looped(_train(task, task.recipe, task.strategy))
    return Way(_spelt_out(many, task.feed), "loop", task.block, why)


def _block(task: Task, block: int, why: str = "") -> Way:
    how: dict[str, Any] = {"feed": task.feed, "together": task.together, "half": task.half, "replay": task.replay}
    many = block_train(task.recipe, task.strategy, task.lr, task.clip, optimizer=task.optimizer, **how)
    return Way(many, "block", block, why)


def _otherwise(task: Task, first: Round, unfit: Unfit) -> Way:
    why, failed = unfit.why, ""
    for way in (_vmap(task, ""), _loop(task, ""))[unfit.mixes :]:
        if not (failed := _fails(way, first) or ""):
            return way._replace(why=why)
        why += f"; by {way.path}: {failed}"
    raise ConfigError(_impossible(task, failed))


def _impossible(task: Task, error: str) -> str:
    how = "" if task.clip is None else " with its examples' gradients apart (torch.func.vmap); privacy=none may"
    return f"recipe: not even one client can train this model{how}: {error}"


def _fastest(task: Task, first: Round, why: Unfit | None) -> Way:
    ways = [_loop(task, "measured")] + ([_vmap(task, "measured")] if why is None or not why.mixes else [])
    if why is None:
        ways += [_block(task, block, "measured") for block in sorted({1, sensible(task, first), task.block})]
    seconds, best, failed = dict[str, float](), ways[0], ""
    for way in ways:
        name = f"{way.path} {way.block}"
        try:
            seconds[name] = _seconds(way, first)
        except (RuntimeError, ValueError) as error:  # no batching rule for some operation, say, or not enough memory
            failed = str(error)
            continue
        best = way if seconds[name] <= min(seconds.values()) else best
    if not seconds:
        raise ConfigError(_impossible(task, failed))
    return best._replace(seconds=seconds, why="measured" if why is None else f"measured; no batches: {why.why}")


def _seconds(way: Way, first: Round) -> float:
    """Seconds a client, of two steps, the second time."""
    clients = min(way.block, len(first.live))
    part, took = first.of(clients, 2), 0.0
    for _ in range(2):
        began = time.perf_counter()
        way.many(*part)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took = time.perf_counter() - began
    return took / clients


def _without_dropout(module: nn.Module) -> nn.Module:
    """What dropout leaves is chosen differently in a batch, so that two results could not be compared."""
    for part in module.modules():
        if type(part) is nn.Dropout:
            part.p = 0.0
        elif isinstance(part, nn.RNNBase | nn.MultiheadAttention):
            part.dropout = 0.0
    return module
