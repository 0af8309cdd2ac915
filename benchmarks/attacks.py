"""What liars send, as functions over stacked updates, for measurements of robust strategies.

Each takes the honest clients' updates ``[H, ...]`` and the liars' own ``[F, ...]``, trained as an honest client would
(or on turned labels, where ATTACKS says so), and returns what the liars send. All of them know all honest updates of the
round, which a real liar seldom does.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fedtailor import STACK, Strategy, tree
from fedtailor.tree import Tree

Attack = Callable[[Tree, Tree], Tree]  # honest [H, ...], the liars' own [F, ...] -> what they send [F, ...]


class Liars(NamedTuple):
    """An attack, and whether the liars train on labels turned to 9 - y."""

    send: Attack
    turned: bool = False


def same(of: Callable[[Tensor], Tensor]) -> Attack:
    """All liars send one function ``[H, ...] -> [...]`` of the honest updates, tensor by tensor."""
    return lambda honest, own: tree.map(lambda h, o: of(h).expand_as(o), honest, own)


def min_max(honest: Tree, own: Tree) -> Tree:
    """As far against the honest spread as no liar is farther from anybody than two honest clients are.

    Shejwalkar and Houmansadr 2021, Manipulating the Byzantine, min-max with the deviation as direction.
    """
    mean, std = (tree.map(lambda h, f=f: f(h, 0), honest) for f in (torch.mean, torch.std))
    flat = torch.cat([h.reshape(len(h), -1) for h in tree.leaves(honest)], 1)
    allowed, low, high = torch.cdist(flat, flat).max(), 0.0, 100.0
    for _ in range(30):
        gamma = (low + high) / 2
        lie = torch.cat([(m - gamma * s).reshape(-1) for m, s in zip(tree.leaves(mean), tree.leaves(std), strict=True)])
        low, high = (gamma, high) if (flat - lie).norm(dim=1).max() <= allowed else (low, gamma)
    return tree.map(lambda m, s, o: (m - low * s).expand_as(o), mean, std, own)


def noise(honest: Tree, own: Tree) -> Tree:
    """Gaussian noise of deviation 200, as in Blanchard et al. 2017, https://arxiv.org/abs/1703.02757; the same each round."""
    generator = torch.Generator().manual_seed(0)
    return tree.map(lambda o: 200 * torch.randn(o.shape, generator=generator), own)


ATTACKS = {
    "none": Liars(lambda honest, own: own),
    "sign flip": Liars(same(lambda h: -h.mean(0))),
    "sign flip, 5": Liars(
        lambda honest, own: tree.map(lambda o: -5 * o, own)
    ),  # its own update: it knows nobody else's
    "inner product, 0.5": Liars(same(lambda h: -0.5 * h.mean(0))),  # Xie et al. 2019, https://arxiv.org/abs/1903.03936
    "inner product, 10": Liars(same(lambda h: -10 * h.mean(0))),
    "a little": Liars(
        same(lambda h: h.mean(0) - 1.5 * h.std(0))
    ),  # Baruch et al. 2019, https://arxiv.org/abs/1902.06156
    "min-max": Liars(min_max),
    "label flip": Liars(lambda honest, own: own, turned=True),
    "model replacement": Liars(
        lambda honest, own: tree.map(lambda o: 20 * o, own), turned=True
    ),  # Bagdasaryan et al. 2020
    "noise": Liars(noise),
    "NaN": Liars(same(lambda h: torch.full_like(h[0], float("nan")))),
}


def attacked(strategy: Strategy, send: Attack, liars: int) -> Strategy:
    """``strategy`` in a world where the last ``liars`` clients send what ``send`` says, with their own weights."""

    def apply(state: Tree, total: Tree, round: int) -> Tree:
        weights = total["weight"].reshape(-1)
        plain = {"delta": tree.map(lambda d: d / weights.reshape(-1, *[1] * (d.dim() - 1)), total["delta"])}
        honest, own = tree.at(plain, slice(None, -liars)), tree.at(plain, slice(-liars, None))
        every = tree.map(lambda h, o: torch.cat([h, o]), honest, send(honest, own))
        sent = {"delta": tree.map(lambda d: d * weights.reshape(-1, *[1] * (d.dim() - 1)), every["delta"])}
        replies = total | sent
        return strategy.apply(state, strategy.reduce.done(strategy.reduce.add(None, replies)), round)

    return strategy._replace(apply=apply, reduce=STACK)
