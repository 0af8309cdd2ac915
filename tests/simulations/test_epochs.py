"""Local epochs of FedAvg, as papers have them, are what a plain loop of PyTorch over a DataLoader makes."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fedtailor import recipe as recipes
from fedtailor.batches import draw
from fedtailor.card import model_card
from fedtailor.config import build
from fedtailor.population import Population
from fedtailor.recipe import Recipe
from fedtailor.simulations.cohort import prepared
from fedtailor.simulations.run import simulate

QUIET = {"evaluation": {"baseline": False}}


@pytest.mark.parametrize("steps", [5, 13])
def test_fedavg_of_shuffled_parts_is_fedavg_of_loaders(plan, sources, steps):
    """An epoch, and more than two and a half; parts differ by a row where a site's rows do not come out even."""
    made = plan(**QUIET, rounds=2, local={"steps": steps, "rate": 0.2, "lr": 0.3, "sampling": "shuffled"})
    recipe = build(made.recipe, Recipe)
    data = prepared(made, recipe, sources)
    model = recipe.model()
    model.load_state_dict(recipes.initial(recipe, made.seed))
    for round in range(made.rounds):
        start = {name: p.clone() for name, p in model.state_dict().items()}
        total = sum(len(one.train.y) for one in data.values())
        ends = {name: torch.zeros_like(p) for name, p in start.items()}
        for site, one in data.items():
            model.load_state_dict(start)
            optimizer = torch.optim.SGD(model.parameters(), made.local.lr)
            parts = [
                part.nonzero()[:, 0].tolist() for part in draw(made.local, len(one.train.y), made.seed, round, site)
            ]
            for x, y in DataLoader(TensorDataset(*one.train), batch_sampler=[part for part in parts if part]):
                optimizer.zero_grad()
                recipe.losses(model(x), y).mean().backward()
                optimizer.step()
            for name, p in model.state_dict().items():
                ends[name] += p * len(one.train.y) / total
        model.load_state_dict(ends)
    found = simulate(made, sources)[1]
    torch.testing.assert_close(found, dict(model.state_dict()), rtol=1e-5, atol=1e-6)


def test_neither_blocks_nor_ways_nor_workers_show(plan, sources):
    made = plan(**QUIET, local={"steps": 5, "rate": 0.25, "lr": 0.3, "sampling": "shuffled"})
    of = Population(partition="dirichlet_split", clients=20, cohort=8, alpha=1.0, minimum=0)
    first = simulate(made, sources, population=of)[1]
    for how in ({"block": 1}, {"block": 7}, {"path": "vmap"}, {"path": "loop"}, {"workers": 2}):
        torch.testing.assert_close(simulate(made, sources, population=of, **how)[1], first, rtol=1e-5, atol=1e-6)


def test_the_card_says_how_rows_were_taken(plan, sources):
    made = plan(**QUIET, local={"steps": 5, "rate": 0.25, "lr": 0.3, "sampling": "shuffled"})
    said = " ".join(model_card(simulate(made, sources)[0], made).split())
    assert (
        "5 steps, each on one of 4 equal parts, in an order drawn anew for every pass over them, of its training"
        in said
    )
