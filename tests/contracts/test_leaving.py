"""What leaves follows from a plan: alike for small models, which are followed as zeros, and for those too large to make."""

import pytest
from forms import private_forms

from fedtailor import Strategy, leaving
from fedtailor.config import build, choices, load
from fedtailor.recipe import Recipe
from fedtailor.tree import Tree

SHIPPED = {name: build(load([f"strategy={name}"]).plan.strategy, Strategy) for name in choices("strategy")}
ALL = SHIPPED | private_forms(SHIPPED)


@pytest.mark.parametrize("name", ALL)
def test_what_leaves_is_the_same_of_small_models_and_of_those_too_large_to_make(name: str, monkeypatch) -> None:
    plan = load(["study=heart", "recipe.model=mlp"]).plan
    recipe, strategy = build(plan.recipe, Recipe), ALL[name]
    devices = []

    def seen(params: Tree) -> Tree:
        devices.extend(x.device.type for x in params.values())
        return {"summand": leaving.summand(plan, strategy, params), "cast": strategy.broadcast(strategy.init(params))}

    small = leaving.spec_of(leaving.followed(recipe, seen))
    monkeypatch.setattr(leaving, "FEW", 0)
    assert leaving.spec_of(leaving.followed(recipe, seen)) == small and set(devices) == {"cpu", "meta"}
