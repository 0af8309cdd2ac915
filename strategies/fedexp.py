"""FedExP: extrapolation of the server's step. Jhunjhunwala et al. 2023, https://arxiv.org/abs/2301.09604."""

from pydantic import PositiveFloat, validate_call
from torch import Tensor

from fedtailor import Local, Strategy, tree
from fedtailor.strategies.fedavg import fedavg
from fedtailor.tree import Tree


@validate_call
def fedexp(epsilon: PositiveFloat = 1e-3) -> Strategy:
    """Take a longer step where clients cancel out: the server's rate follows from how far their changes agree.

    The model is the mean of the last two iterates, as in the paper, because the last one swings; so a cast holds two
    sets of parameters. A summand holds the change's squared length too, so that ``private()`` clips and noises the two
    together: a valid guarantee, and a poor estimate of the rate.

    Args:
        epsilon: added to the squared length of the mean change; a larger one is more careful.
    """
    mean = fedavg()

    def report(local: Local) -> tuple[Tree, Tree]:
        summand, memory = mean.report(local)
        squared = tree.norm(summand["delta"]).square() / local.num_examples  # of delta = weight * change
        return summand | {"squares": squared.to(local.num_examples.dtype)}, memory

    def apply(state: Tree, total: Tree, round: int) -> Tree:
        step = tree.map(lambda d: d / total["weight"], total["delta"])
        spread = total["squares"] / total["weight"]
        rate = (spread / (2 * (tree.norm(step).square() + epsilon))).clamp(min=1)
        return {"params": tree.step(state["params"], step, rate), "before": state["params"]}

    def broadcast(state: Tree) -> Tree:
        return {"params": state["params"], "model": tree.map(_midway, state["params"], state["before"])}

    return mean._replace(
        init=lambda params: {"params": params, "before": params}, broadcast=broadcast, report=report, apply=apply
    )


def _midway(a: Tensor, b: Tensor) -> Tensor:
    return (a + b) / 2
