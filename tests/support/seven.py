"""Seven clients of different sizes, for what every strategy keeps."""

import torch
from torch import Tensor

from fedtailor import Strategy, tree
from fedtailor.training import local_train, plain
from fedtailor.tree import Tree

K, S, B, D = 7, 5, 4, 3


def losses(params: Tree, x: Tensor, y: Tensor) -> Tensor:
    return (x @ params["w"] + params["norm.head"] - y).square()


class World:
    """Seven clients of different sizes that take one to five steps on batches of one to four examples."""

    def __init__(self, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.params = {"w": torch.randn(D, generator=rng), "norm.head": torch.zeros(())}
        self.counts = torch.randint(2, 50, (K,), generator=rng).float()
        self.live = (torch.arange(S) < torch.randint(1, S + 1, (K, 1), generator=rng)).float()
        self.batches = {
            "x": torch.randn(K, S, B, D, generator=rng),
            "y": torch.randn(K, S, B, generator=rng),
            "live": (torch.arange(B) < torch.randint(1, B + 1, (K, S, 1), generator=rng)).float(),
            "scale": torch.full((K, S), 1 / B),
            "seed": torch.randint(2**62, (K, 1), generator=rng).expand(K, S),
        }
        self.order = torch.randperm(K, generator=rng).tolist()

    def start(self, strategy: Strategy) -> tuple[Tree, list[Tree]]:
        return strategy.init(self.params), [strategy.remember(self.params) for _ in range(K)]

    def reply(self, strategy: Strategy, cast: Tree, memory: Tree, k: int) -> tuple[Tree, Tree]:
        train = local_train(plain(losses), strategy, 0.05, losses)
        return train(cast, memory, tree.at(self.batches, k), self.live[k], self.counts[k])
