"""Norm bound of each reply. Sun et al. 2019, Can You Really Backdoor Federated Learning, https://arxiv.org/abs/1911.07963."""

from pydantic import PositiveFloat, validate_call

from fedtailor import Strategy
from fedtailor.strategies.inner import FEDAVG, Inner
from fedtailor.strategies.stacked import norms, scaled, through
from fedtailor.tree import Tree


@validate_call
def norm_bound(of: Inner = FEDAVG, bound: PositiveFloat | None = None) -> Strategy:
    """Shorten each reply to a bound, on the server: nobody shouts, and a replaced model counts as one voice.

    Args:
        of: the strategy whose replies they are.
        bound: in L2 norm of the whole update; null is the median of the round's norms.
    """

    def shorten(replies: Tree, round: int) -> Tree:
        length = norms(replies)
        most = length.median() if bound is None else bound
        return scaled((most / length.clamp(min=1e-12)).clamp(max=1), replies)

    return through(of, shorten)
