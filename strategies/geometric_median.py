"""Geometric median by smoothed Weiszfeld steps (RFA). Pillutla et al. 2022, https://arxiv.org/abs/1912.13445."""

import torch
from pydantic import PositiveFloat, PositiveInt, validate_call

from fedtailor import Strategy
from fedtailor.strategies.inner import FEDAVG, Inner
from fedtailor.strategies.stacked import apart, combined, inner_products, size, through
from fedtailor.tree import Tree


@validate_call
def geometric_median(
    of: Inner = FEDAVG, smoothing: PositiveFloat = 1e-6, iterations: PositiveInt = 1000, tolerance: PositiveFloat = 1e-9
) -> Strategy:
    """The point with the least sum of distances to the replies: withstands any minority, and need not know its size.

    Args:
        of: the strategy whose replies they are.
        smoothing: a reply nearer than this, in L2 norm of the whole update, draws no harder.
        iterations: of Weiszfeld's, at most.
        tolerance: no weight moves by more than this at the end.
    """

    def weigh(replies: Tree, round: int) -> Tree:
        products = inner_products(replies)  # all iterations live here, in [K, K]
        between = apart(products)
        near = between[between.sqrt().sum(1).argmin()].argsort()[: size(replies) // 2 + 1]
        weights = torch.zeros(size(replies), dtype=torch.double).index_fill(0, near, 1 / len(near))
        for _ in range(iterations):
            squares = products.diag() - 2 * products @ weights + weights @ products @ weights
            pull = 1 / squares.clamp(min=0).sqrt().clamp(min=smoothing)
            before, weights = weights, pull / pull.sum()
            if (weights - before).abs().max() < tolerance:
                break
        return combined(weights[None], replies)

    return through(of, weigh)
