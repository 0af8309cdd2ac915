"""Centred clipping. Karimireddy et al. 2021, https://arxiv.org/abs/2012.10333."""

from pydantic import PositiveFloat, PositiveInt, validate_call

from fedtailor import STACK, Strategy, tree
from fedtailor.strategies.inner import FEDAVG, Inner, nothing
from fedtailor.strategies.stacked import combined, counted_once, finite, norms, reduced, size
from fedtailor.tree import Tree


@validate_call
def centred_clipping(of: Inner = FEDAVG, radius: PositiveFloat = 1.0, iterations: PositiveInt = 1) -> Strategy:
    """Move the last round's mean towards each reply, no further than a radius: one reply alone cannot take it far.

    Args:
        of: the strategy whose replies they are.
        radius: the most that one reply may differ, in L2 norm of the whole update (the paper's tau).
        iterations: moves a round.
    """
    if "centre" in of.init({}):
        raise ValueError("of: it is centred clipping already, and a state has one centre")

    def apply(state: Tree, total: Tree, round: int) -> Tree:
        replies, centre = finite(total), state["centre"]
        for _ in range(iterations):
            length = norms(tree.map(lambda x, c: x - c, replies, centre))
            weights = (radius / length.clamp(min=1e-12)).clamp(max=1) / size(replies)
            moved = tree.at(combined(weights[None], replies), 0)
            kept = float(1 - weights.sum())
            centre = tree.map(lambda c, m, kept=kept: kept * c + m, centre, moved)
        return of.apply(_without(state), reduced(of, tree.at(centre, None)), round) | {"centre": centre}

    return counted_once(of)._replace(
        init=lambda params: of.init(params) | {"centre": nothing(of, params)},
        broadcast=lambda state: of.broadcast(_without(state)),
        apply=apply,
        reduce=STACK,
    )


def _without(state: Tree) -> Tree:
    return {k: v for k, v in state.items() if k != "centre"}
