"""Nearest-neighbour mixing. Allouah et al. 2023, Fixing by Mixing, https://arxiv.org/abs/2302.01772."""

import torch
from pydantic import NonNegativeInt, validate_call

from fedtailor import Strategy
from fedtailor.strategies.inner import Inner
from fedtailor.strategies.stacked import combined, distances, liars, size, through
from fedtailor.tree import Tree


@validate_call
def nnm(of: Inner, attackers: NonNegativeInt = 1) -> Strategy:
    """Replace each reply by the mean of its nearest: honest replies come closer, so that the rule inside errs less.

    Args:
        of: the rule to prepare replies for, such as {name: trimmed_mean, attackers: 2}; alone it withstands nothing.
        attackers: the most replies that may lie; each reply is mixed with all but as many.
    """

    def mix(replies: Tree, round: int) -> Tree:
        nearest = distances(replies).argsort(1)[:, : size(replies) - liars(attackers, replies)]
        rows = torch.zeros(size(replies), size(replies), dtype=torch.double)
        return combined(rows.scatter(1, nearest, 1 / nearest.shape[1]), replies)

    return through(of, mix)
