"""Stochastic quantisation, after QSGD. Alistarh et al. 2017, https://arxiv.org/abs/1610.02132."""

from typing import Annotated

import torch
from pydantic import Field, validate_call
from torch import Tensor

from fedtailor import Strategy, seeds, tree
from fedtailor.strategies.compression import with_feedback
from fedtailor.strategies.inner import FEDAVG, Inner
from fedtailor.tree import Tree


@validate_call
def quantise(of: Inner = FEDAVG, bits: Annotated[int, Field(ge=2, le=16)] = 8) -> Strategy:
    """Round each coordinate up or down by chance, right in the mean: 8 bits take a quarter of the bytes, 4 an eighth.

    Args:
        of: the strategy whose summands are shrunk.
        bits: of one coordinate, its sign among them; a tensor's largest coordinate sets its scale (QSGD takes the norm).
            More than 8 make more values than a packing's table holds, and save hardly any bytes.
    """
    levels = 2 ** (bits - 1) - 1

    def rounded(wanted: Tree, seed: Tensor | None) -> Tree:
        if seed is None:
            raise ValueError("batches: no seed; rounding by chance is keyed by seed, round and client")
        drawn, sent = 0, dict[str, Tensor]()
        for path, x in sorted(tree.flatten(wanted).items()):  # a file keeps no order
            scale = x.abs().amax()
            exact = torch.where(scale > 0, x.abs() / scale, torch.zeros_like(x)) * levels
            chance = seeds.uniform(seed, x.numel(), skip=drawn).reshape(x.shape)
            drawn += x.numel()
            code = exact.floor() + (chance < exact - exact.floor()).to(x.dtype)
            sent[path] = x.sign() * code * (scale / levels) + 0.0  # no minus zero: it would be one value more
        return tree.unflatten(sent)

    return with_feedback(of, rounded)
