"""Arithmetic on stacked replies, trees whose leaves are ``[K, ...]``, and the wrapper that the robust strategies are.

A robust strategy is a function from K replies to M replies, M = 1 where it decides, that comes before the reduction of a
strategy inside. So any of them goes round any strategy, and round each other.
Norms and distances are those of whole replies, all tensors together, in float64 and on the CPU.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fedtailor import STACK, Strategy, tree
from fedtailor.errors import ConfigError
from fedtailor.strategies.inner import values
from fedtailor.strategy import PIECE
from fedtailor.tree import Tree

Pass = Callable[[Tree, int], Tree]  # replies [K, ...], round -> replies [M, ...]


def through(of: Strategy, fn: Pass) -> Strategy:
    """``of``, whose replies pass through ``fn``, all of a round at once, before ``of`` reduces them.

    Every client counts once, whatever it says of its rows, and one that is not finite does not count at all.
    """

    def apply(state: Tree, total: Tree, round: int) -> Tree:
        return of.apply(state, reduced(of, fn(finite(total), round)), round)

    return counted_once(of)._replace(apply=apply, reduce=STACK)


def counted_once(of: Strategy) -> Strategy:
    """``of``, told by every client that it has one example: a mean weighted by rows becomes a plain one."""
    return of._replace(report=lambda local: of.report(local._replace(num_examples=torch.ones_like(local.num_examples))))


def reduced(of: Strategy, replies: Tree) -> Tree:
    """The total that ``of`` makes of ``replies``, each with a weight of one that the server gives it."""
    ones = tree.leaves(replies)[0].new_ones(size(replies))
    return of.reduce.done(of.reduce.add(None, replies | {"weight": ones}))


def finite(total: Tree) -> Tree:
    """The replies of a stack that are finite, without their weights.

    Raises:
        ConfigError: code ``nonfinite``, if there is none.
    """
    replies, kept = values(total), alive(total)
    return replies if kept.all() else tree.at(replies, kept)


def alive(total: Tree) -> Tensor:
    """Which replies of a stack ``[K]`` are finite, their weights set aside.

    Raises:
        ConfigError: code ``nonfinite``, if none is.
    """
    kept = norms(values(total)).isfinite()
    if not kept.any():
        raise ConfigError(f"none of the round's {len(kept)} replies is finite", code="nonfinite")
    return kept


def size(replies: Tree) -> int:
    """K, the number of replies."""
    return len(tree.leaves(replies)[0])


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """``x [K, ...]`` as matrices ``[K, n]`` that may be copied to float64 one at a time."""
    return torch.split(x.reshape(len(x), -1), max(1, PIECE // len(x)), dim=1)


def norms(replies: Tree) -> Tensor:
    """The L2 norm of each reply ``[K]``; not finite where the reply is not."""
    squares = (p.double().square().sum(1).cpu() for x in tree.leaves(replies) for p in _pieces(x))
    return sum(squares, torch.zeros(())).sqrt()


def distances(replies: Tree) -> Tensor:
    """The squared L2 distance of every two replies ``[K, K]``."""
    return apart(inner_products(replies))


def inner_products(replies: Tree) -> Tensor:
    """The inner product of every two replies ``[K, K]``."""
    total = torch.zeros(size(replies), size(replies), dtype=torch.double)
    for x in tree.leaves(replies):
        for piece in _pieces(x):
            precise = piece.double()
            total += (precise @ precise.T).cpu()
    return total


def apart(products: Tensor) -> Tensor:
    """Squared distances from inner products, both ``[K, K]``."""
    square = products.diag()
    return (square[:, None] + square[None, :] - 2 * products).clamp(min=0).fill_diagonal_(0)


def combined(weights: Tensor, replies: Tree) -> Tree:
    """Linear combinations of replies: ``weights [M, K]`` and leaves ``[K, ...]`` make leaves ``[M, ...]``."""
    return tree.map(lambda x: (weights.to(x) @ x.reshape(len(x), -1)).reshape(-1, *x.shape[1:]), replies)


def scaled(factors: Tensor, replies: Tree) -> Tree:
    """Each reply times its factor ``[K]``."""
    return tree.map(lambda x: x * factors.to(x).reshape(-1, *[1] * (x.dim() - 1)), replies)


def middle(x: Tensor) -> Tensor:
    """The median over the first axis, the mean of the two middle values where there are two: ``[1, ...]``."""
    low, high = x.median(0, keepdim=True).values, -(-x).median(0, keepdim=True).values
    return torch.where(low == high, low, low / 2 + high / 2)


def liars(attackers: int, replies: Tree) -> int:
    """How many liars to reckon with among ``replies``: ``attackers``, or the greatest minority where they are fewer."""
    return min(attackers, (size(replies) - 1) // 2)
