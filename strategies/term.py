"""Tilted averaging (TERM). Li et al. 2021, Tilted Empirical Risk Minimization, https://arxiv.org/abs/2007.01162."""

from typing import Annotated

from pydantic import Field, validate_call

from fedtailor import Local, Strategy, tree
from fedtailor.strategies.fedavg import fedavg
from fedtailor.strategy import Elementwise
from fedtailor.tree import Tree

MOST = 80.0  # of an exponent: exp(80) is a float32


@validate_call
def term(tilt: Annotated[float, Field(ge=-10, le=10)] = 1.0) -> Strategy:
    """Weight each client by ``exp(tilt * loss)``: a positive tilt lifts the worst served, a negative one leaves out who differs.

    The client level of the paper's hierarchical objective. A summand shows the client's training loss; no record-level
    guarantee covers it, and such a study is refused.

    Args:
        tilt: 0 counts every client once.
    """

    def report(local: Local) -> tuple[Tree, Tree]:
        assert local.loss is not None  # local_train measures it, because needs_loss says so
        share = (tilt * local.loss).clamp(-MOST, MOST).exp()
        delta = tree.map(lambda end, start: share * (end - start), local.params, local.cast["params"])
        return {"delta": delta, "share": share}, local.memory

    def apply(state: Tree, total: Tree, round: int) -> Tree:
        return {"params": tree.step(state["params"], total["delta"], 1 / total["share"])}

    return fedavg()._replace(report=report, apply=Elementwise(apply), needs_loss=True)
