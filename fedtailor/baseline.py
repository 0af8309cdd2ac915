"""What a site would have had without the others: the same steps on its own data only, without any privacy."""

import torch

from fedtailor import recipe as recipes
from fedtailor.batches import draw, pack
from fedtailor.optimizers import Kept, descended, optimizer_of
from fedtailor.recipe import Part, Recipe
from fedtailor.strategy import trained
from fedtailor.study import Plan
from fedtailor.training import parted, plain
from fedtailor.tree import Params, joined, map


def train_alone(recipe: Recipe, part: Part, plan: Plan, site: str) -> Params:
    """Train from the study's own start for ``rounds * steps`` plain steps on one site's rows.

    The result says what taking part is worth to this site. It is not private and never leaves it; only its metrics do.
    """
    gradient, params = plain(recipes.losses(recipe)), recipes.initial(recipe, plan.seed)
    optimizer, kept, rate = optimizer_of(plan.local), Kept(), torch.tensor(plan.local.lr)
    for round in range(plan.rounds):
        mask = draw(plan.local, len(part.y), plan.seed, round, site)
        batches = pack(part, mask, plan.local.poisson_rate)
        for step in range(plan.local.steps):
            batch = {name: leaf[step] for name, leaf in batches.items()}
            moving, fixed = parted(params, trained)
            before = round * plan.local.steps + step  # it trains on, and so keeps what its optimizer knows
            moved, kept = descended(optimizer, moving, gradient(moving, batch, fixed), kept, rate, before)
            params = joined(params, moved)
    with torch.no_grad():
        return map(torch.clone, params)
