"""Adapters: what they compute, which of their parameters travel, and that what is frozen is the same everywhere."""

import math

import pytest
import torch
from torch import nn

from fedtailor import recipe as recipes
from fedtailor.adapters import adapted, layers, merged
from fedtailor.baseline import train_alone
from fedtailor.batches import draw, pack
from fedtailor.client.private_gate import check_private
from fedtailor.config import build, load
from fedtailor.errors import ConfigError
from fedtailor.recipe import Part, Recipe
from fedtailor.recipes import tabular
from fedtailor.strategy import trained
from fedtailor.training import plain

A, B, SHIFT = "layers.body.lora_a.weight", "layers.body.lora_b.weight", "layers.body.lora_shift.weight"


def mlp():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def drawn(params, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=rng) for name, p in params.items()}


@pytest.fixture
def table_recipe():
    return tabular("heart", model="mlp", hidden=8, adapters=2, exact=True)


def test_an_adapted_layer_by_hand():
    layer = adapted(nn.Linear(3, 2), 1, alpha=4, exact=True)
    values = drawn({name: p.detach() for name, p in layer.named_parameters()})
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(9))
    low = values["lora_b.weight"] @ values["lora_a.weight"] + values["lora_shift.weight"]
    expected = x @ (values["base.weight"] + 4 * low).T + values["base.bias"]
    torch.testing.assert_close(torch.func.functional_call(layer, values, (x,)), expected)


def test_it_starts_as_its_base():
    torch.manual_seed(1)
    plain_one = mlp()
    torch.manual_seed(1)
    module, x = adapted(mlp(), 2, exact=True), torch.randn(4, 6)
    assert torch.equal(module(x), plain_one(x)) and module[0].lora_a.weight.any()


def test_the_layers_that_match_are_frozen_and_nothing_else_is():
    module = adapted(nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4)), 2, where=["0"])
    named = {name: p.requires_grad for name, p in module.named_parameters()}
    assert {name for name, moves in named.items() if not moves} == {"0.base.weight", "0.base.bias"}
    assert layers(recipes.parameters(module)) == ["0."]


@pytest.mark.parametrize(
    ("rank", "where", "says"), [(2, ["9"], "there are"), (6, ["*"], "1 to 5"), (0, ["*"], "1 to 5")]
)
def test_what_cannot_be_adapted_is_named(rank, where, says):
    with pytest.raises(ConfigError, match=f"adapters: .*{says}"):
        adapted(mlp(), rank, where=where)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_merged_model_is_a_plain_one_that_computes_the_same(exact, bias):
    def fresh():
        return nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 4))

    torch.manual_seed(0)
    module, x = adapted(fresh(), 2, alpha=3, where=["0"], exact=exact), torch.randn(9, 6)
    params = drawn(recipes.parameters(module))
    folded, other = merged(module, params), fresh()
    other.load_state_dict(folded)  # strict: every key, and no other
    torch.testing.assert_close(other(x), torch.func.functional_call(module, params, (x,)))


def test_frozen_weights_are_drawn_alike_whatever_the_generator_has_done(table_recipe):
    torch.manual_seed(0)
    one = table_recipe.model().layers.body.base
    torch.manual_seed(1)
    two = table_recipe.model().layers.body.base
    assert torch.equal(one.weight, two.weight) and torch.equal(one.bias, two.bias)
    bound = 1 / math.sqrt(one.in_features)
    assert one.weight.abs().max() <= bound and abs(one.weight.std() - bound / math.sqrt(3)) < 0.1 * bound
    # the first three, written down: another machine or a newer torch must draw these too
    expected = [-0.03020309843122959, 0.04499420151114464, -0.13353605568408966]
    assert one.weight.flatten()[:3].tolist() == expected


def test_each_frozen_layer_has_weights_of_its_own():
    module = adapted(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), 2, key="k")
    other = adapted(nn.Sequential(nn.Linear(6, 6)), 2, key="l")
    first, second, third = module[0].base.weight, module[1].base.weight, other[0].base.weight
    assert not torch.equal(first, second) and not torch.equal(first, third)


def test_loaded_weights_are_left_as_they_are():
    base = nn.Linear(3, 3)
    before = base.weight.clone()
    assert torch.equal(adapted(base, 1).base.weight, before)


def test_what_is_frozen_does_not_travel(table_recipe):
    start, shapes = recipes.initial(table_recipe, 3), recipes.shapes(table_recipe)
    assert {A, B, SHIFT} < start.keys() and not any("base" in name for name in start)
    assert {k: tuple(v.shape) for k, v in start.items()} == {k: tuple(v.shape) for k, v in shapes.items()}
    assert all(x.device.type == "meta" for x in shapes.values())
    full = recipes.initial(tabular("heart", model="mlp", hidden=8), 3)
    inputs = full["layers.body.weight"].shape[1]
    fewer = recipes.initial(tabular("heart", model="mlp", hidden=8, adapters=2), 3)
    count = [sum(x.numel() for x in one.values()) for one in (full, fewer)]
    assert count[0] - count[1] == 8 * inputs + 8 - 2 * (inputs + 8)


def test_losses_and_metrics_are_those_of_one_model(table_recipe):
    """Each makes a module of its own; frozen weights that differed would show."""
    params = drawn(recipes.initial(table_recipe, 0))
    rng = torch.Generator().manual_seed(5)
    width = table_recipe.model().layers.body.base.in_features
    part = Part(torch.randn(40, width, generator=rng), (torch.rand(40, generator=rng) < 0.5).float())
    mean = recipes.losses(table_recipe)(params, part.x, part.y).mean()
    torch.rand(7)
    assert recipes.evaluate(table_recipe, params, part)["loss"] == pytest.approx(mean.item(), rel=1e-5)


def test_training_alone_moves_the_adapter_and_not_the_shift(table_recipe):
    plan = load(["study=heart", "rounds=2", "recipe=heart_mlp", "recipe.adapters=2", "recipe.exact=true"]).plan
    width = table_recipe.model().layers.body.base.in_features
    rng = torch.Generator().manual_seed(2)
    part = Part(torch.randn(50, width, generator=rng), (torch.rand(50, generator=rng) < 0.5).float())
    recipe = build(plan.recipe, Recipe)
    start, end = recipes.initial(recipe, plan.seed), train_alone(recipe, part, plan, "a")
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved == start.keys() - {SHIFT}
    # the shift has a gradient: it is not that nothing would have moved it
    batch = {k: v[0] for k, v in pack(part, draw(plan.local, 50, 0, 0, "a"), plan.local.rate).items()}
    assert plain(recipes.losses(recipe))(start, batch)[SHIFT].any() and not trained(SHIFT)


def test_a_model_with_adapters_is_one_that_privacy_can_work_with(table_recipe):
    width = table_recipe.model().layers.body.base.in_features
    check_private(table_recipe, Part(torch.randn(4, width), torch.ones(4)))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"adapters": 2}, "adapters: .*model=mlp"), ({"model": "mlp", "exact": True}, "exact: .*adapters"),
     ({"model": "mlp", "adapters": 0}, "adapters")],
)  # fmt: skip
def test_arguments_that_make_no_sense_together_are_refused(arguments, says):
    with pytest.raises((ConfigError, ValueError), match=says):
        tabular("heart", **arguments)


def test_it_is_reachable_from_the_command_line():
    plan = load(["study=heart", "recipe.model=mlp", "recipe.adapters=4", "strategy=ffa_lora"]).plan
    assert recipes.initial(build(plan.recipe, Recipe), 0)[A].shape[0] == 4


def test_a_layer_of_somebody_elses_that_is_called_shift_is_trained():
    """Only an adapter's own shift is the server's: no name that a recipe is likely to use may stop a layer's training."""
    assert trained("encoder.shift.weight") and trained("shift.weight") and not trained(SHIFT)
