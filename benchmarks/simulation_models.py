"""The models of benchmarks/simulation.py, which needs them in two interpreters: torch only."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def cnn(first: int, second: int, hidden: int) -> nn.Module:
    """pfl-research's benchmark model, without dropout, in any width."""
    return nn.Sequential(
        nn.Conv2d(3, first, 3), nn.ReLU(), nn.Conv2d(first, second, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(14 * 14 * second, hidden), nn.ReLU(), nn.Linear(hidden, 10),
    )  # fmt: skip


def small_cnn() -> nn.Module:
    """3 to 16 to 32 channels on 32 x 32, then 64 and 10 units."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2048, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


class Adapted(nn.Module):
    """A frozen linear layer and a low-rank change of it that is trained."""

    weight: Tensor

    def __init__(self, inputs: int, outputs: int, rank: int = 8) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(outputs, inputs) / inputs**0.5)
        self.down, self.up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., inputs]`` to ``[..., outputs]``."""
        change: Tensor = self.up(self.down(x))
        return x @ self.weight.mT + change


class Block(nn.Module):
    """One transformer block of frozen weights with low-rank adapters, on [B, 32, 64]; ten classes of the mean."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = Adapted(width, 3 * width), Adapted(width, width)
        self.widen, self.narrow = Adapted(width, 4 * width), Adapted(4 * width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, width]`` to ``[B, 10]``."""
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in self.qkv(self.one(x)).chunk(3, -1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.narrow(nn.functional.gelu(self.widen(self.two(x))))
        found: Tensor = self.head(x.mean(1))
        return found


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)),
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 128), nn.ReLU(), nn.Linear(128, 10)),
    "tiny_cnn": lambda: cnn(8, 8, 32),
    "cnn": lambda: cnn(32, 64, 128),  # its own width: 1,626,442 parameters
    "tabular": lambda: nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 2)),
    "small_cnn": small_cnn,
    "lora": Block,
}
