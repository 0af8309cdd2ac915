"""The tabular recipe: known numbers, preparation by the contract alone, and models that privacy can work with."""

import random

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from fedtailor import recipe as recipes
from fedtailor.client.private_gate import check_private
from fedtailor.contract import Contract, Row, load_contract
from fedtailor.errors import ConfigError, ContractError
from fedtailor.recipes import tabular
from fedtailor.recipes.tabular import encode

CONTRACT = Contract.model_validate(
    {
        "name": "ward",
        "columns": [
            {"name": "weight", "kind": "number", "bounds": [0, 200], "default": 80},
            {"name": "stage", "kind": "category", "codes": [1, 2, 3]},
            {"name": "dose", "kind": "number", "bounds": [-4, 12]},
        ],
        "label": {"name": "died", "positive": [1], "negative": [0]},
        "min_rows": 4,
    }
)
ROWS = 60


@pytest.fixture
def table():
    """Sixty people who differ in weight; every fifth has no dose, every seventh no stage."""
    rng = random.Random(0)
    return {
        "weight": [str(30 + 2 * i) for i in range(ROWS)],
        "stage": ["" if i % 7 == 0 else str(1 + i % 3) for i in range(ROWS)],
        "dose": ["" if i % 5 == 0 else f"{rng.uniform(-4, 12):.3f}" for i in range(ROWS)],
        "died": [str(int(i % 3 == 0)) for i in range(ROWS)],
    }


def take(table, rows):
    return {name: [cells[i] for i in rows] for name, cells in table.items()}


def examples(dataset):
    """Every prepared row with its label, by weight."""
    parts = [*zip(*dataset.train, strict=True), *zip(*dataset.test, strict=True)]
    return {round(x[0].item(), 4): (x.tolist(), y.item()) for x, y in parts}


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        ((100.0, 0.0, 4.0), [0, 0, 1, 0, 0, 0, 0, 0]),
        ((0.0, 1.0, -4.0), [-2, 0, 0, 1, 0, 0, -2, 0]),
        ((200.0, 2.0, 12.0), [2, 0, 0, 0, 1, 0, 2, 0]),
        ((150.0, 0.0, 6.0), [1, 0, 1, 0, 0, 0, 0.5, 0]),
        ((None, None, None), [-0.4, 1, 0, 0, 0, 1, 0, 1]),
        ((80.0, None, None), [-0.4, 0, 0, 0, 0, 1, 0, 1]),
    ],
)
def test_a_row_is_coded_as_by_hand(values, numbers):
    assert encode(CONTRACT, Row(values, 0.0, None)) == pytest.approx(numbers)


def test_heart_has_26_numbers_and_three_codes_per_missing_thing():
    rows = Row((None,) * 13, 0.0, None)
    made = encode(load_contract("heart"), rows)
    assert len(made) == 5 * 2 + (3 + 5 + 3 + 4 + 3 + 4 + 5 + 4) == tabular("heart").model().layers[0].in_features
    assert made.count(1.0) == 13


def test_a_row_is_prepared_alone_as_among_others(table):
    recipe = tabular(CONTRACT)
    among = examples(recipe.prepare(table))
    assert len(among) == ROWS
    for rows in (range(0, 8), range(ROWS - 20, ROWS), range(0, ROWS, 9)):
        few = examples(recipe.prepare(take(table, rows)))
        assert len(few) == len(rows) and all(few[weight] == among[weight] for weight in few)


def test_every_row_is_on_one_side_with_its_label(table):
    dataset = tabular(CONTRACT, test_fraction=0.25).prepare(table)
    assert (len(dataset.train.y), len(dataset.test.y), dataset.rows) == (45, 15, 60)
    assert dataset.train.x.shape == (45, 8) and dataset.train.x.dtype == dataset.train.y.dtype == torch.float32
    for weight, (_, label) in examples(dataset).items():
        i = round((weight * 50 + 100 - 30) / 2)
        assert label == float(table["died"][i])


def test_the_fingerprint_does_not_depend_on_the_order_of_rows(table):
    recipe = tabular(CONTRACT)
    mixed = random.Random(1).sample(range(ROWS), ROWS)
    a, b = recipe.prepare(table), recipe.prepare(take(table, mixed))
    assert a.fingerprint == b.fingerprint and examples(a) == examples(b)


def test_the_fingerprint_changes_with_any_cell_and_with_any_row(table):
    recipe, cells = tabular(CONTRACT), [(name, i) for name in table for i in range(0, ROWS, 7)]
    seen = [recipe.prepare(table).fingerprint]
    for name, i in cells:
        was = table[name][i]
        table[name][i] = {"weight": "199", "stage": "32"[was == "3"], "dose": "11.999", "died": "10"[was == "1"]}[name]
        seen.append(recipe.prepare(table).fingerprint)
        table[name][i] = was
    for rows in (range(1, ROWS), [0, *range(ROWS)]):
        seen.append(recipe.prepare(take(table, rows)).fingerprint)
    assert len(set(seen)) == len(seen) == len(cells) + 3


def test_the_fingerprint_does_not_change_with_how_a_number_is_written(table):
    recipe = tabular(CONTRACT)
    other = table | {
        "weight": [f" {float(cell):.1f}" for cell in table["weight"]],
        "died": [f"{c}.0" for c in table["died"]],
    }
    assert recipe.prepare(other).fingerprint == recipe.prepare(table).fingerprint


def test_the_fingerprint_knows_whose_row_it_is(table):
    recipe = tabular(CONTRACT.model_copy(update={"subject": "who"}))
    people = [f"p{i // 2}" for i in range(ROWS)]
    assert (
        recipe.prepare(table | {"who": people}).fingerprint != recipe.prepare(table | {"who": people[::-1]}).fingerprint
    )


def test_what_is_missing_is_noted(table):
    assert tabular(CONTRACT).prepare(table).notes == (
        "stage: missing in 9 of 60 rows",
        "dose: missing in 12 of 60 rows",
    )


def test_a_table_that_breaks_the_contract_is_refused(table):
    with pytest.raises(ContractError, match="weight, row 3: 999 lies outside 0 to 200"):
        tabular(CONTRACT).prepare(
            table | {"weight": ["1", "2", "999", "4"]} | {k: table[k][:4] for k in ("stage", "dose", "died")}
        )
    with pytest.raises(ContractError, match="each side needs at least two"):
        tabular(CONTRACT, test_fraction=0.01).prepare(table)


@pytest.mark.parametrize(
    "bad", [{"model": "forest"}, {"hidden": 0}, {"test_fraction": 1.0}, {"test_fraction": 0}, {"deep": 1}]
)
def test_an_argument_out_of_range_is_refused(bad):
    with pytest.raises(ValidationError, match=next(iter(bad))):
        tabular(CONTRACT, **bad)
    with pytest.raises(ConfigError, match="'nowhere' is not installed"):
        tabular("nowhere")


def test_logistic_regression_starts_at_zero_and_is_linear(table):
    recipe = tabular(CONTRACT)
    module, part = recipe.model(), recipe.prepare(table).train
    assert [tuple(p.shape) for p in module.parameters()] == [(1, 8), (1,)]
    assert not any(p.any() for p in module.parameters())
    with torch.no_grad():
        module.layers[0].weight.copy_(torch.arange(8.0))
        module.layers[0].bias.fill_(0.5)
    torch.testing.assert_close(module(part.x), part.x @ torch.arange(8.0) + 0.5)


def test_the_loss_is_one_number_an_example(table):
    recipe = tabular(CONTRACT)
    outputs, y = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([1.0, 1.0, 0.0])
    torch.testing.assert_close(recipe.losses(outputs, y), torch.log1p(torch.exp(torch.tensor([0.0, -2.0, -1.0]))))
    assert recipe.losses(outputs, y).mean() == binary_cross_entropy_with_logits(outputs, y)


@pytest.mark.parametrize("model", ["logistic", "mlp"])
def test_a_seed_gives_every_site_the_same_start(model):
    recipe = tabular(CONTRACT, model=model, hidden=5)
    one, two, other = (recipes.initial(recipe, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one) == (model == "logistic")
    if model == "mlp":
        assert sorted(tuple(p.shape) for p in one.values()) == [(1,), (1, 5), (5,), (5,), (5,), (5, 8)]


@pytest.mark.parametrize("model", ["logistic", "mlp"])
def test_each_model_keeps_examples_apart_as_privacy_needs(model, table):
    recipe = tabular(CONTRACT, model=model, hidden=4)
    part = recipe.prepare(table).train
    check_private(recipe, part)
    mixing = recipe._replace(model=lambda: nn.Sequential(nn.BatchNorm1d(8), recipe.model()))
    with pytest.raises(ConfigError, match="use GroupNorm or LayerNorm"):
        check_private(mixing, part)
