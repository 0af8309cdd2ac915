"""Top-k sparsification. Stich et al. 2018, Sparsified SGD with Memory, https://arxiv.org/abs/1809.07599."""

import math
from typing import Annotated

import torch
from pydantic import Field, validate_call
from torch import Tensor

from fedtailor import Strategy, tree
from fedtailor.strategies.compression import with_feedback
from fedtailor.strategies.inner import FEDAVG, Inner
from fedtailor.tree import Tree


@validate_call
def topk(of: Inner = FEDAVG, fraction: Annotated[float, Field(gt=0, le=1)] = 0.01) -> Strategy:
    """Send the largest coordinates only and keep the rest for later: 1 % of them takes an eightieth of the bytes.

    Args:
        of: the strategy whose summands are shrunk.
        fraction: of all coordinates together that is sent; at least one is.
    """

    def largest(wanted: Tree, seed: Tensor | None) -> Tree:
        parts = tree.leaves(wanted)
        flat = torch.cat([x.reshape(-1) for x in parts])
        index = flat.abs().topk(math.ceil(fraction * len(flat) - 1e-9)).indices
        sparse = torch.zeros_like(flat).scatter(0, index, flat.gather(0, index))
        kept = iter(torch.split(sparse, [x.numel() for x in parts]))
        return tree.map(lambda x: next(kept).reshape(x.shape).to(x.dtype), wanted)

    return with_feedback(of, largest)
