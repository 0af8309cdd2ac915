"""Local optimizers: how a site makes steps of gradients, with the meaning of ``torch.optim``'s by the same names.

An optimizer is a value: one pure function of one tensor, so that it works as well on one client's parameters as on a
block's, with or without ``vmap``, and on gradients that are private already: what it adds costs no epsilon. It begins
anew in every round, because a client keeps nothing between two but what its strategy remembers.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fedtailor import tree
from fedtailor.study import LocalTraining, Sgd
from fedtailor.tree import Tree

Moments = tuple[Tensor, ...]  # what an optimizer keeps of a parameter between steps; empty before the first
Kept = dict[str, Moments]  # by the parameter's path


class Optimizer(NamedTuple):
    """What becomes of a parameter and of what is kept of it."""

    update: Callable[[Tensor, Tensor, Moments, Tensor, int], tuple[Tensor, Moments]]
    # parameter, gradient, kept, learning rate, steps before -> parameter, kept; a rate of 0 leaves the parameter as it is
    plain: bool = False  # whether it is ``parameter - rate * gradient`` and nothing else


def sgd(momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0) -> Optimizer:
    """``torch.optim.SGD``.

    >>> import torch
    >>> one, rate = torch.ones(1), torch.tensor(0.1)
    >>> p, kept = sgd(0.5).update(one, one, (), rate, 0)
    >>> sgd(0.5).update(p, one, kept, rate, 1)[0]  # 1 - 0.1 - 0.1 * 1.5
    tensor([0.7500])
    """

    def update(p: Tensor, g: Tensor, kept: Moments, rate: Tensor, before: int) -> tuple[Tensor, Moments]:
        g = g + weight_decay * p if weight_decay else g
        if not momentum:
            return p - rate * g, kept
        velocity = momentum * kept[0] + g if kept else g
        return p - rate * (g + momentum * velocity if nesterov else velocity), (velocity,)

    return Optimizer(update, plain=not momentum and not weight_decay)


def adam(
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0, decoupled: bool = False
) -> Optimizer:
    """``torch.optim.Adam`` (Kingma and Ba 2015, Algorithm 1, https://arxiv.org/abs/1412.6980).

    Args:
        decoupled: weights decay by themselves and not through the gradient: ``torch.optim.AdamW`` (Loshchilov and Hutter
            2019, Algorithm 2, https://arxiv.org/abs/1711.05101).
    """
    first, second = betas

    def update(p: Tensor, g: Tensor, kept: Moments, rate: Tensor, before: int) -> tuple[Tensor, Moments]:
        if weight_decay and decoupled:
            p = p * (1 - rate * weight_decay)
        elif weight_decay:
            g = g + weight_decay * p
        mean = first * kept[0] + (1 - first) * g if kept else (1 - first) * g
        square = second * kept[1] + (1 - second) * g * g if kept else (1 - second) * g * g
        root = (square / (1 - second ** (before + 1))).sqrt() + eps
        return p - rate / (1 - first ** (before + 1)) * mean / root, (mean, square)

    return Optimizer(update)


SGD = sgd()


def optimizer_of(local: LocalTraining) -> Optimizer:
    """What a plan names."""
    named = local.optimizer
    if isinstance(named, Sgd):
        return sgd(named.momentum, named.nesterov, named.weight_decay)
    return adam(named.betas, named.eps, named.weight_decay, decoupled=named.name == "adamw")


def descended(
    optimizer: Optimizer, params: Tree, grads: Tree, kept: Kept, rate: Tensor, before: int
) -> tuple[Tree, Kept]:
    """One step of all parameters that have a gradient.

    Shapes:
        params, grads: trees of leaves ``[...]`` with ``rate []``, or ``[K, ...]`` with ``rate [K]``.

    Returns:
        Those parameters after it, a tree like ``grads``, and what is kept of them.
    """
    old, moved, after = tree.flatten(params), dict[str, Tensor](), Kept()
    for path, g in tree.flatten(grads).items():
        by = rate.to(g.dtype).view(*rate.shape, *[1] * (g.dim() - rate.dim())) if rate.dim() else rate
        moved[path], after[path] = optimizer.update(old[path], g, kept.get(path, ()), by, before)
    return tree.unflatten(moved), after
