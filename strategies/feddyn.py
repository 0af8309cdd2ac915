"""FedDyn: dynamic regularisation. Acar et al. 2021, https://arxiv.org/abs/2111.04263."""

import torch
from pydantic import PositiveFloat, PositiveInt, validate_call

from fedtailor import Local, Strategy, tree
from fedtailor.strategy import Elementwise
from fedtailor.tree import Tree


@validate_call
def feddyn(alpha: PositiveFloat = 0.01, population: PositiveInt | None = None) -> Strategy:
    """Tilt each client's loss so that all optima meet in the joint one: for local training that goes far.

    Args:
        alpha: how hard a local step is held to the broadcast parameters.
        population: the clients there are in all (the paper's m); null is whoever replies in a round.
    """

    def zeros(params: Tree) -> Tree:
        return {"tilt": tree.map(torch.zeros_like, params)}

    def correct(grads: Tree, params: Tree, cast: Tree, memory: Tree) -> Tree:
        return tree.map(lambda g, h, w, w0: g - h + alpha * (w - w0), grads, memory["tilt"], params, cast["params"])

    def report(local: Local) -> tuple[Tree, Tree]:
        delta = tree.map(lambda end, start: end - start, local.params, local.cast["params"])
        memory = {"tilt": tree.map(lambda h, d: h - alpha * d, local.memory["tilt"], delta)}
        return {"delta": delta, "weight": torch.ones_like(local.num_steps)}, memory

    def apply(state: Tree, total: Tree, round: int) -> Tree:
        everybody = total["weight"] if population is None else population
        tilt = tree.step(state["tilt"], total["delta"], -alpha / everybody)
        mean = tree.step(state["params"], total["delta"], 1 / total["weight"])
        return {"params": tree.step(mean, tilt, -1 / alpha), "tilt": tilt}

    return Strategy(
        init=lambda params: {"params": params} | zeros(params),
        remember=zeros,
        correct=correct,
        report=report,
        apply=Elementwise(apply),
    )
