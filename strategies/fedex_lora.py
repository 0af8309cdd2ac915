"""FedEx-LoRA: exact averages of adapters. Singhal et al. 2024, https://arxiv.org/abs/2410.09432."""

from typing import Literal

from pydantic import validate_call

from fedtailor import Local, Strategy, tree
from fedtailor.adapters import LORA_A, SHIFT, layers
from fedtailor.errors import ConfigError
from fedtailor.strategies.fedavg import fedavg
from fedtailor.strategies.products import PRODUCTS, residual
from fedtailor.strategy import trained
from fedtailor.tree import Tree


@validate_call
def fedex_lora(weighting: Literal["examples", "equal"] = "examples") -> Strategy:
    """Average both halves of adapters, and add what the mean of their products has beyond that to the frozen weight.

    That is kept as the adapter's shift, which is cast, ``[out, in]`` a layer, and never sent. Without adapters it is
    FedAvg.

    Args:
        weighting: ``examples`` weights a client by its rows; ``equal`` counts every client once.
    """
    mean = fedavg(weighting=weighting)

    def report(local: Local) -> tuple[Tree, Tree]:
        return mean.report(local._replace(params={k: v for k, v in local.params.items() if trained(k)}))

    def apply(state: Tree, total: Tree, round: int) -> Tree:
        before = state["params"]
        params = before | tree.map(lambda d, p: p + (d / total["weight"]).to(p.dtype), total["delta"], before)
        for layer in layers(before):
            shift = before[layer + SHIFT]
            params[layer + SHIFT] = shift + residual(total, layer).to(shift.dtype)
        return {"params": params}

    return mean._replace(init=_with_shifts, report=report, apply=apply, reduce=PRODUCTS)


def _with_shifts(params: Tree) -> Tree:
    for layer in layers(params):
        if layer + SHIFT not in params:
            raise ConfigError(
                f"strategy: adapter {layer + LORA_A!r} has no shift to be exact with; give it one (recipe.exact=true), "
                "or choose fedavg or ffa_lora"
            )
    return {"params": params}
