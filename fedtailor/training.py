"""Local training, written once: called as is on a client, and under ``vmap`` over many clients in a simulation.

A batch is a Poisson sample padded to a fixed size: ``x [B, ...]``, ``y [B]``, ``live [B]`` (1.0 for an example, 0.0 for
padding) and ``scale []``, the public ``1 / (rate * num_examples)``. The divisor is the expected batch size, never the
drawn one, so that it says nothing about who was drawn.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fedtailor import tree
from fedtailor.errors import ConfigError
from fedtailor.optimizers import SGD, Kept, Optimizer, descended
from fedtailor.strategy import Local, Strategy
from fedtailor.tree import Tree

Losses = Callable[[Tree, Tensor, Tensor], Tensor]  # params, x [B, ...], y [B] -> loss of each example [B]
Gradient = Callable[..., Tree]  # params, batch, and the parameters that stay, where some do -> gradient of params
Train = Callable[[Tree, Tree, Tree, Tensor, Tensor], tuple[Tree, Tree]]
NONE: Tree = {}

NO_LOSS = (
    "strategy: it weights each site by the loss of its training rows, which record-level privacy (privacy.epsilon) does "
    "not cover; choose another strategy, or privacy=none"
)


def plain(losses: Losses) -> Gradient:
    """The gradient of the batch's loss, without any privacy."""
    every = together(losses)

    def gradient(params: Tree, batch: Tree, fixed: Tree = NONE) -> Tree:
        found: Tree = torch.func.grad(lambda moving: mean_loss(every, tree.joined(fixed, moving), batch))(params)
        return found

    return gradient


def together(losses: Losses) -> Losses:
    """``losses`` of several models at once: each example's loss is the sum of its losses under each.

    So each model's gradient is its own, and one clipping bounds what an example does to all of them together.

    Shapes:
        params: the parameters of one model, or those of several, by name.
    """

    def fn(params: Tree, x: Tensor, y: Tensor) -> Tensor:
        several = [one for one in params.values() if isinstance(one, dict)]
        return torch.stack([losses(one, x, y) for one in several]).sum(0) if several else losses(params, x, y)

    return fn


def parted(params: Tree, trains: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """The parameters that local training moves, and those that stay."""
    flat = tree.flatten(params)
    moving = {path: p for path, p in flat.items() if trains(path.rpartition("/")[2])}
    return tree.unflatten(moving), tree.unflatten({path: p for path, p in flat.items() if path not in moving})


def mean_loss(losses: Losses, params: Tree, batch: Tree) -> Tensor:
    """The sum of a batch's losses over its expected size: without bias, the mean loss of the client's examples."""
    total: Tensor = (losses(params, batch["x"], batch["y"]) * batch["live"]).sum() * batch["scale"]
    return total


def clipped(losses: Losses, clip: float) -> Gradient:
    """The sum of per-example gradients, each clipped to ``clip``, plus ``batch["noise"]``, times the public scale.

    Formal guarantee: before noise, adding or removing one example changes the sum by at most ``clip`` in L2 norm; an
    example whose gradient is not finite counts as zero. With noise of deviation ``clip * z`` in every coordinate one
    step is the Gaussian mechanism with multiplier ``z``. The guarantee needs noise from a secret, sufficiently random
    source: a simulation's seeded noise is for studying accuracy and is labelled as such.
    Abadi et al. 2016, Algorithm 1, https://arxiv.org/abs/1607.00133.

    Shapes:
        batch: as above, and ``noise``, a tree like the parameters, already scaled to ``clip * z``.
    """

    every = together(losses)

    def one(params: Tree, fixed: Tree, x: Tensor, y: Tensor) -> Tree:
        example = torch.func.grad(lambda p: every(tree.joined(fixed, p), x[None], y[None])[0])(params)
        return tree.clip(example, clip)

    def gradient(params: Tree, batch: Tree, fixed: Tree = NONE) -> Tree:
        each = torch.func.vmap(one, in_dims=(None, None, 0, 0), randomness="different")(  # of dropout, if there is any
            params, fixed, batch["x"], batch["y"]
        )
        total = tree.map(lambda g: torch.einsum("b,b...->...", batch["live"].to(g.dtype), g), each)
        return tree.map(lambda g, n: (g + n) * batch["scale"], total, batch["noise"])

    return gradient


def local_train(
    gradient: Gradient,
    strategy: Strategy,
    lr: float,
    losses: Losses | None = None,
    over: Callable[[], bool] = lambda: False,
    optimizer: Optimizer = SGD,
) -> Train:
    """Build ``train(cast, memory, batches, live, num_examples) -> (summand, memory)``: local SGD, or another optimizer.

    Args:
        gradient: of one batch; :func:`plain` or :func:`clipped`.
        strategy: corrects each gradient and says what is reported.
        lr: the client's learning rate.
        losses: for a strategy that needs each client's loss: it is measured at the cast parameters, on the examples of
            this round's steps. None where training is private, because no guarantee covers that figure.
        over: asked before every step but the first, whether the client's time is over; it reports the steps it took.
        optimizer: makes steps of gradients; what it keeps begins anew in each round.

    Shapes:
        batches: leaves ``[S, ...]`` for S local steps, among them ``seed``, if a strategy makes random choices; live:
            ``[S]``, 0.0 where a step is padding, after all others; num_examples: ``[]``.

    Raises:
        ConfigError: if the strategy needs a loss and there is none.
    """
    if strategy.needs_loss and losses is None:
        raise ConfigError(NO_LOSS)

    def train(cast: Tree, memory: Tree, batches: Tree, live: Tensor, num_examples: Tensor) -> tuple[Tree, Tree]:
        params, loss, kept = strategy.start(cast, memory), None, Kept()
        if strategy.needs_loss and losses is not None:
            each = [mean_loss(losses, cast["params"], tree.at(batches, step)) for step in range(len(live))]
            loss = (torch.stack(each) * live).sum() / live.sum()
        for step, alive in enumerate(live.unbind()):
            if step and over():
                live = live[:step]
                break
            moving, fixed = parted(params, strategy.trains)
            given = (moving, tree.at(batches, step), fixed) if fixed else (moving, tree.at(batches, step))
            grads = strategy.correct(gradient(*given), params, cast, memory)
            moved, kept = descended(optimizer, params, grads, kept, lr * alive, step)
            params = tree.joined(params, moved)
        seed = batches["seed"][0] if "seed" in batches else None
        return strategy.report(Local(cast, memory, params, num_examples, live.sum(), lr, seed, loss))

    return train
