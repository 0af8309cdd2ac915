"""How exactly a simulation multiplies: a choice for speed on a GPU, which a deployment does not have.

``tf32`` and ``bf16`` round what products are made of to 10 and to 7 bits after the first, and add up in float32. With
``bf16`` a model's own products and convolutions, forth and back, are made of such numbers; losses, gradients' lengths,
clipping, noise, sums and the weights themselves are float32, and so are all products by which lengths are measured.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fedtailor.config import Precision
from fedtailor.errors import ConfigError
from fedtailor.recipe import Recipe
from fedtailor.simulations.folded import halved
from fedtailor.training import Losses
from fedtailor.tree import Tree


@contextmanager
def multiplied(precision: Precision, clipped: bool) -> Iterator[None]:
    """While it lasts, a GPU multiplies float32 as asked for; torch's own choice would round in convolutions only.

    Numbers of ``bf16`` lose nothing in TF32. But with privacy of records an example's length is measured by products, and
    these, and what is clipped by it, are float32.

    Args:
        clipped: whether examples' gradients are, as with privacy of records.

    Raises:
        ConfigError: if they are, and ``tf32`` would round their lengths.
    """
    if clipped and precision == "tf32":
        raise ConfigError(
            "simulation.precision: tf32 rounds the lengths that privacy=record clips examples by; use float32, or bf16, "
            "which measures and clips in float32"
        )
    rounded = precision != "float32" and not clipped
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = rounded
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


def half_losses(recipe: Recipe) -> Losses:
    """What :func:`fedtailor.recipe.losses` is, of a model that runs in bfloat16."""
    module = recipe.model()

    def fn(params: Tree, x: Tensor, y: Tensor) -> Tensor:
        return recipe.losses(halved(lambda x: torch.func.functional_call(module, params, (x,)), x), y)

    return fn
