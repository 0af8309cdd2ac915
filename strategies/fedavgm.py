"""FedAvgM. Hsu et al. 2019, https://arxiv.org/abs/1909.06335."""

import torch
from pydantic import PositiveFloat, validate_call

from fedtailor import Strategy, tree
from fedtailor.strategies.fedavg import fedavg
from fedtailor.strategies.fedopt import Decay
from fedtailor.strategy import Elementwise
from fedtailor.tree import Tree


@validate_call
def fedavgm(server_lr: PositiveFloat = 1.0, momentum: Decay = 0.9) -> Strategy:
    """FedAvg with momentum on the server: smooths rounds that pull in different directions.

    Args:
        server_lr: the share of the velocity that is taken.
        momentum: decay of the velocity. A constant change is taken 1 / (1 - momentum) times over in the end.
    """

    def apply(state: Tree, total: Tree, round: int) -> Tree:
        scale = 1 / total["weight"]
        velocity = tree.map(lambda v, d: momentum * v + (scale * d).to(v.dtype), state["velocity"], total["delta"])
        return {"params": tree.step(state["params"], velocity, server_lr), "velocity": velocity}

    return fedavg()._replace(
        init=lambda params: {"params": params, "velocity": tree.map(torch.zeros_like, params)}, apply=Elementwise(apply)
    )
