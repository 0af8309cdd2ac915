"""Bulyan. El Mhamdi et al. 2018, https://arxiv.org/abs/1802.07927."""

from pydantic import NonNegativeInt, validate_call
from torch import Tensor

from fedtailor import Strategy, tree
from fedtailor.strategies.inner import FEDAVG, Inner
from fedtailor.strategies.krum import scores
from fedtailor.strategies.stacked import distances, liars, middle, size, through
from fedtailor.tree import Tree


@validate_call
def bulyan(of: Inner = FEDAVG, attackers: NonNegativeInt = 1) -> Strategy:
    """Krum's choices one after another, then each coordinate's mean about their median: no single coordinate is free.

    Args:
        of: the strategy whose replies they are.
        attackers: the most replies that may lie; the guarantee needs 4 attackers + 3 replies, so set the quorum to that.
    """

    def select(replies: Tree, round: int) -> Tree:
        out, apart = liars(attackers, replies), distances(replies)
        rest, chosen = list(range(size(replies))), list[int]()
        while len(chosen) < max(1, size(replies) - 2 * out):  # each choice is Krum's among those that are left
            chosen.append(rest.pop(int(scores(apart[rest][:, rest], out).argmin())))
        near = max(1, len(chosen) - 2 * out)

        def about_the_median(x: Tensor) -> Tensor:
            closest = (x - middle(x)).abs().argsort(0)[:near]
            return x.gather(0, closest).mean(0, keepdim=True)

        return tree.map(lambda x: about_the_median(x[chosen]), replies)

    return through(of, select)
