"""q-FedAvg. Li et al. 2020, Fair Resource Allocation, Algorithm 2, https://arxiv.org/abs/1905.10497."""

from pydantic import NonNegativeFloat, validate_call

from fedtailor import Local, Strategy, tree
from fedtailor.strategies.fedavg import fedavg
from fedtailor.strategy import Elementwise
from fedtailor.tree import Tree

LEAST = 1e-10  # added to a loss, so that 0 has a power


@validate_call
def qfedavg(q: NonNegativeFloat = 1.0) -> Strategy:
    """Weight each client by a power of its loss: those whom the model serves badly are heard more.

    A summand shows the client's training loss; no record-level guarantee covers it, and such a study is refused.

    Args:
        q: how much fairness; 0 counts every client once.
    """

    def report(local: Local) -> tuple[Tree, Tree]:
        assert local.loss is not None  # local_train measures it, because needs_loss says so
        loss, slope = local.loss + LEAST, 1 / local.lr  # the paper's F_k(w) and L
        delta = tree.map(lambda end, start: slope * (end - start), local.params, local.cast["params"])
        square = tree.norm(delta).square().to(loss.dtype)
        height = q * loss ** (q - 1) * square + slope * loss**q
        return {"delta": tree.map(lambda d: loss**q * d, delta), "height": height}, local.memory

    def apply(state: Tree, total: Tree, round: int) -> Tree:
        return {"params": tree.step(state["params"], total["delta"], 1 / total["height"])}

    return fedavg()._replace(report=report, apply=Elementwise(apply), needs_loss=True, plain_sgd=True)
