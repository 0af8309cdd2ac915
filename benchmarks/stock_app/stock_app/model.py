"""What is trained: the heart study's logistic regression, or random parameters of any size."""

import torch
from torch import Tensor

CHUNK = 1_000_000


def initial(parameters: int, width: int) -> dict[str, Tensor]:
    """Start values: of a logistic regression over ``width`` inputs, or ``parameters`` random numbers.

    They are random because Flower stores and sends equal chunks once only.
    """
    if not parameters:
        return {"weight": torch.zeros(1, width), "bias": torch.zeros(1)}
    sizes = [min(CHUNK, parameters - begin) for begin in range(0, parameters, CHUNK)]
    return {f"layer{i:03d}": torch.randn(size) for i, size in enumerate(sizes)}
