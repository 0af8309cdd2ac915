"""Coordinate-wise trimmed mean. Yin et al. 2018, https://arxiv.org/abs/1803.01498."""

from pydantic import NonNegativeInt, validate_call
from torch import Tensor

from fedtailor import Strategy, tree
from fedtailor.strategies.inner import FEDAVG, Inner
from fedtailor.strategies.stacked import liars, through
from fedtailor.tree import Tree


@validate_call
def trimmed_mean(of: Inner = FEDAVG, attackers: NonNegativeInt = 1) -> Strategy:
    """Each coordinate is the replies' mean without its extremes: withstands a minority of known size.

    Args:
        of: the strategy whose replies they are.
        attackers: the most replies that may lie; as many of the greatest and of the least values are left out.
    """

    def trim(replies: Tree, round: int) -> Tree:
        out = liars(attackers, replies)

        def inside(x: Tensor) -> Tensor:
            return x.sort(0).values[out : len(x) - out].mean(0, keepdim=True)

        return tree.map(inside, replies)

    return through(of, trim)
