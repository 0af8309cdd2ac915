"""What is trained: the heart study's logistic regression, or random parameters of any size."""

import torch
from torch import Tensor

from fedtailor import recipe as recipes
from fedtailor.recipe import Recipe
from fedtailor.recipes.tabular import tabular

CHUNK = 1_000_000


def heart() -> Recipe:
    """The recipe of ``configs/recipe/heart.yaml``."""
    return tabular("heart", "logistic")


def initial(parameters: int) -> dict[str, Tensor]:
    """Start values; random ones for a model by size, because equal chunks would be stored and sent once only."""
    if not parameters:
        return recipes.initial(heart(), 0)
    sizes = [min(CHUNK, parameters - begin) for begin in range(0, parameters, CHUNK)]
    return {f"layer{i:03d}": torch.randn(size) for i, size in enumerate(sizes)}
