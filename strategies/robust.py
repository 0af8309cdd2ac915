"""A default against liars: median norm bound, nearest-neighbour mixing, trimmed mean.

Allouah et al. 2023, https://arxiv.org/abs/2302.01772, whose mixing makes a trimmed mean optimal in the order of the
liars' share; the norm bound keeps one reply from spoiling those that it is mixed with. Neighbours are found by direction
here: the mean turned round is shorter than any honest reply, so by distance it would be near to all of them.
"""

from pydantic import NonNegativeInt, validate_call

from fedtailor import Strategy
from fedtailor.strategies.inner import FEDAVG, Inner
from fedtailor.strategies.nnm import nnm
from fedtailor.strategies.norm_bound import norm_bound
from fedtailor.strategies.trimmed_mean import trimmed_mean


@validate_call
def robust(of: Inner = FEDAVG, attackers: NonNegativeInt = 1) -> Strategy:
    """Bound, mix and trim the replies: the choice against liars where nothing is known of their attack.

    Args:
        of: the strategy whose replies they are.
        attackers: the most replies that may lie; a round must have more than twice as many, so set the quorum to that.
    """
    return norm_bound(nnm(trimmed_mean(of, attackers), attackers, nearest="direction"))
