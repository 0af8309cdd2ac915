"""Ditto: a model of one's own, held near the shared one. Li et al. 2021, https://arxiv.org/abs/2012.04221."""

from pydantic import NonNegativeFloat, validate_call

from fedtailor import Local, Strategy, tree
from fedtailor.strategies.inner import FEDAVG, Shared, inner
from fedtailor.tree import Tree


@validate_call
def ditto(of: Shared = FEDAVG, pull: NonNegativeFloat = 0.1) -> Strategy:
    """Train a second model at each site, which never leaves it and is pulled towards the shared one.

    Both are trained on the same examples. Under record-level privacy an example's gradients for the two are clipped
    together, so that the guarantee is that of one model, and the noise falls on both.

    Args:
        of: the strategy for the shared model.
        pull: the paper's lambda: 0 is a model trained alone; a large one is the shared model.
    """

    def start(cast: Tree, memory: Tree) -> Tree:
        return {"shared": cast["params"], "own": memory["own"]}

    def correct(grads: Tree, params: Tree, cast: Tree, memory: Tree) -> Tree:
        own = tree.map(lambda g, v, w: g + pull * (v - w), grads["own"], params["own"], cast["params"])
        return {"shared": of.correct(grads["shared"], params["shared"], cast, inner(memory)), "own": own}

    def report(local: Local) -> tuple[Tree, Tree]:
        summand, kept = of.report(local._replace(memory=inner(local.memory), params=local.params["shared"]))
        return summand, {"own": local.params["own"], "of": kept}

    return of._replace(
        remember=lambda params: {"own": params, "of": of.remember(params)},
        start=start,
        correct=correct,
        report=report,
        personal=lambda cast, memory: memory["own"],
    )
