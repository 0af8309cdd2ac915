"""Nearest-neighbour mixing. Allouah et al. 2023, Fixing by Mixing, https://arxiv.org/abs/2302.01772."""

from typing import Literal

import torch
from pydantic import NonNegativeInt, validate_call
from torch import Tensor

from fedtailor import Strategy
from fedtailor.strategies.inner import Inner
from fedtailor.strategies.stacked import apart, combined, inner_products, liars, size, through
from fedtailor.tree import Tree


@validate_call
def nnm(of: Inner, attackers: NonNegativeInt = 1, nearest: Literal["distance", "direction"] = "distance") -> Strategy:
    """Replace each reply by the mean of its nearest: honest replies come closer, so that the rule inside errs less.

    Args:
        of: the rule to prepare replies for, such as {name: trimmed_mean, attackers: 2}; alone it withstands nothing.
        attackers: the most replies that may lie; each reply is mixed with all but as many.
        nearest: ``distance``, as in the paper; ``direction``, by the angle: a reply that is short lies near to everybody,
            also where it points the other way.
    """

    def mix(replies: Tree, round: int) -> Tree:
        products = inner_products(replies)
        far = apart(products) if nearest == "distance" else 1 - _cosines(products)
        chosen = far.fill_diagonal_(-1).argsort(1)[:, : size(replies) - liars(attackers, replies)]
        return combined(torch.zeros_like(far).scatter(1, chosen, 1 / chosen.shape[1]), replies)

    return through(of, mix)


def _cosines(products: Tensor) -> Tensor:
    """Of the angles between replies ``[K, K]``; 0 where one is zero, which has no direction."""
    length = products.diag().clamp(min=0).sqrt()
    return products / (length[:, None] * length[None, :]).clamp(min=torch.finfo(products.dtype).tiny)
