"""Models without a batched form, and a task and a round to try them with."""

import torch
from folk import started, world
from torch import nn
from torch.nn.functional import cross_entropy, dropout

from fedtailor import strategies
from fedtailor.recipe import Recipe
from fedtailor.simulations.feed import NOTHING
from fedtailor.simulations.paths import Round, Task


class Scaled(nn.Module):
    """A parameter of its own."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = nn.Linear(6, 3), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.inner(x) * self.scale


class Lucky(nn.Module):
    """Draws for itself."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x):
        return self.inner(dropout(x, 0.5))


def task(model, clip=None, block=64, together=False):
    def losses(outputs, y):
        return cross_entropy(outputs, y, reduction="none")

    recipe = Recipe("made up", None, lambda: model().double(), losses, None)
    return Task(recipe, strategies.fedavg(), 0.3, clip, NOTHING, block, together)


def first_round(recipe, clip=None):
    params, batches, live, counts = world(recipe, lambda rng, *n: torch.randn(*n, 6, generator=rng).double(), clip)
    cast, memory = started(strategies.fedavg(), params)
    return Round(cast, memory, batches, live, counts)
