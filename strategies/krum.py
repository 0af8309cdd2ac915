"""Krum and Multi-Krum. Blanchard et al. 2017, https://arxiv.org/abs/1703.02757."""

import torch
from pydantic import NonNegativeInt, PositiveInt, validate_call
from torch import Tensor

from fedtailor import Strategy
from fedtailor.strategies.inner import FEDAVG, Inner
from fedtailor.strategies.stacked import combined, distances, liars, size, through
from fedtailor.tree import Tree


@validate_call
def krum(of: Inner = FEDAVG, attackers: NonNegativeInt = 1) -> Strategy:
    """The one reply that lies closest to its neighbours: withstands liars, and hears nobody else.

    Args:
        of: the strategy whose replies they are.
        attackers: the most replies that may lie; the guarantee needs 2 attackers + 3 replies, so set the quorum to that.
    """
    return multi_krum(of, attackers, keep=1)


@validate_call
def multi_krum(of: Inner = FEDAVG, attackers: NonNegativeInt = 1, keep: PositiveInt | None = None) -> Strategy:
    """The mean of the replies that lie closest to their neighbours: withstands liars, and hears the others.

    Args:
        of: the strategy whose replies they are.
        attackers: the most replies that may lie; the guarantee needs 2 attackers + 3 replies, so set the quorum to that.
        keep: how many replies to average; null is all but the attackers.
    """

    def select(replies: Tree, round: int) -> Tree:
        out = liars(attackers, replies)
        kept = scores(distances(replies), out).argsort()[: keep or size(replies) - out]
        return combined(torch.zeros(1, size(replies), dtype=torch.double).index_fill(1, kept, 1 / len(kept)), replies)

    return through(of, select)


def scores(apart: Tensor, attackers: int) -> Tensor:
    """Each reply's sum of squared distances to its K - attackers - 2 nearest others: ``[K, K]`` to ``[K]``."""
    near = max(1, len(apart) - attackers - 2)
    others = apart.sort(1).values[:, 1:]  # the nearest of all is the reply itself
    # With one neighbour each, the two that are nearest to each other tie: the next one decides, not the order of arrival.
    return others[:, :near].sum(1) + 1e-6 * others[:, near : near + 1].sum(1)
