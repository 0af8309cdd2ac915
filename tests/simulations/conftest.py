"""A small study with made-up data, as a plan names it and as sources hand it over."""

from collections.abc import Callable

import pytest
import torch

from fedtailor.datasets import Loaded
from fedtailor.sources import DataSource
from fedtailor.study import Plan

ROWS = {"north": 40, "south": 60, "west": 90}
CONTRACT = {
    "name": "made-up",
    "columns": [
        {"name": "a", "kind": "number", "bounds": [-4, 4]},
        {"name": "b", "kind": "number", "bounds": [-4, 4]},
        {"name": "c", "kind": "category", "codes": ["x", "y"]},
    ],
    "label": {"name": "ill", "positive": [1], "negative": [0]},
}


@pytest.fixture
def sources() -> dict[str, DataSource]:
    """Three sites of different size; illness follows a - b, and being seen at "west" makes c likelier to be x."""
    found: dict[str, DataSource] = {}
    for site, rows in ROWS.items():
        rng = torch.Generator().manual_seed(rows)
        a, b, noise, c = torch.randn(4, rows, generator=rng).clamp(-4, 4)
        ill = (a - b + 0.5 * noise > 0).int()
        codes = ["x" if value > (-0.5 if site == "west" else 0.5) else "y" for value in c]
        table = {
            "a": [f"{v:.4f}" for v in a],
            "b": [f"{v:.4f}" for v in b],
            "c": codes,
            "ill": [str(int(v)) for v in ill],
        }
        found[site] = Loaded(table)
    return found


@pytest.fixture
def plan() -> Callable[..., Plan]:
    """Make a plan; keyword arguments replace its fields."""

    def make(**fields: object) -> Plan:
        plain: dict[str, object] = {
            "study": "made-up",
            "rounds": 3,
            "sites": list(ROWS),
            "quorum": 3,
            "deadline_s": 60,
            "local": {"steps": 2, "rate": 0.4, "lr": 0.3},
            "strategy": {"_target_": "fedtailor.strategies.fedavg"},
            "recipe": {"_target_": "fedtailor.recipes.tabular", "contract": CONTRACT},
            "privacy": None,
        }
        return Plan.model_validate(plain | fields)

    return make
