"""Signs with a scale (EF-signSGD). Karimireddy et al. 2019, https://arxiv.org/abs/1901.09847."""

from pydantic import validate_call
from torch import Tensor

from fedtailor import Strategy, tree
from fedtailor.strategies.compression import with_feedback
from fedtailor.strategies.inner import FEDAVG, Inner
from fedtailor.tree import Tree


@validate_call
def sign(of: Inner = FEDAVG) -> Strategy:
    """Send each coordinate's sign, times its tensor's mean size: a bit each, a thirtieth of the bytes.

    Args:
        of: the strategy whose summands are shrunk.
    """

    def signs(wanted: Tree, seed: Tensor | None) -> Tree:
        return tree.map(lambda x: x.sign() * x.abs().mean(), wanted)

    return with_feedback(of, signs)
