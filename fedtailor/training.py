"""Local training, written once: called as is on a client, and under ``vmap`` over many clients in a simulation.

A batch is a Poisson sample padded to a fixed size: ``x [B, ...]``, ``y [B]``, ``live [B]`` (1.0 for an example, 0.0 for
padding) and ``scale []``, the public ``1 / (rate * num_examples)``. The divisor is the expected batch size, never the
drawn one, so that it says nothing about who was drawn.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fedtailor import tree
from fedtailor.strategy import Local, Strategy
from fedtailor.tree import Tree

Losses = Callable[[Tree, Tensor, Tensor], Tensor]  # params, x [B, ...], y [B] -> loss of each example [B]
Gradient = Callable[[Tree, Tree], Tree]  # params, batch -> gradient
Train = Callable[[Tree, Tree, Tree, Tensor, Tensor], tuple[Tree, Tree]]


def plain(losses: Losses) -> Gradient:
    """The gradient of the batch's loss, without any privacy."""

    def loss(params: Tree, batch: Tree) -> Tensor:
        total: Tensor = (losses(params, batch["x"], batch["y"]) * batch["live"]).sum() * batch["scale"]
        return total

    return torch.func.grad(loss)


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

    def one(params: Tree, x: Tensor, y: Tensor) -> Tree:
        example = torch.func.grad(lambda p: losses(p, x[None], y[None])[0])(params)
        return tree.clip(example, clip)

    def gradient(params: Tree, batch: Tree) -> Tree:
        each = torch.func.vmap(one, in_dims=(None, 0, 0))(params, batch["x"], batch["y"])
        total = tree.map(lambda g: torch.einsum("b,b...->...", batch["live"].to(g.dtype), g), each)
        return tree.map(lambda g, n: (g + n) * batch["scale"], total, batch["noise"])

    return gradient


def local_train(gradient: Gradient, strategy: Strategy, lr: float) -> Train:
    """Build ``train(cast, memory, batches, live, num_examples) -> (summand, memory)``: plain local SGD.

    Args:
        gradient: of one batch; :func:`plain` or :func:`clipped`.
        strategy: corrects each gradient and says what is reported.
        lr: the client's learning rate.

    Shapes:
        batches: leaves ``[S, ...]`` for S local steps; live: ``[S]``, 0.0 where a step is padding; num_examples: ``[]``.
    """

    def train(cast: Tree, memory: Tree, batches: Tree, live: Tensor, num_examples: Tensor) -> tuple[Tree, Tree]:
        params = cast["params"]
        for step, alive in enumerate(live.unbind()):
            grads = strategy.correct(gradient(params, tree.at(batches, step)), params, cast, memory)
            params = tree.map(lambda p, g, rate=lr * alive: p - rate * g, params, grads)
        return strategy.report(Local(cast, memory, params, num_examples, live.sum(), lr))

    return train
