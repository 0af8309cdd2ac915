"""Metrics against scikit-learn, and None for whatever cannot be estimated."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn
from torch import nn

from fedtailor.recipe import Part, Recipe, evaluate
from fedtailor.recipes import tabular
from fedtailor.recipes.metrics import RARE, binary

NAMES = ["auroc", "auprc", "accuracy", "f1", "precision", "recall", "loss"]


def labels(negative, positive):
    return torch.tensor([0.0] * negative + [1.0] * positive)


def logits(count, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def none(found):
    return [name for name, value in found.items() if value is None]


@given(st.integers(RARE, 30), st.integers(RARE, 30), st.integers(0, 1000), st.booleans())
@settings(max_examples=50, deadline=None)
def test_they_are_scikit_learns(negative, positive, seed, ties):
    y, outputs = labels(negative, positive), logits(negative + positive, seed)
    outputs = outputs.round() if ties else outputs
    outputs[-1], outputs[0] = 1.0, 1.0  # a decision for each class that counts
    truth, score = y.numpy(), torch.sigmoid(outputs.double()).numpy()
    decided = score > 0.5
    expected = {
        "auroc": sklearn.roc_auc_score(truth, score),
        "auprc": sklearn.average_precision_score(truth, score),
        "accuracy": sklearn.accuracy_score(truth, decided),
        "f1": sklearn.f1_score(truth, decided),
        "precision": sklearn.precision_score(truth, decided),
        "recall": sklearn.recall_score(truth, decided),
        "loss": sklearn.log_loss(truth, score),
    }
    found = binary(outputs, y)
    assert list(found) == NAMES and all(type(value) is float for value in found.values())
    assert found == pytest.approx(expected, abs=1e-9)


def test_they_are_known_for_ten_rows():
    y = labels(5, 5)
    outputs = torch.tensor([-2.0, -1.0, 1.0, -1.0, 0.0, 2.0, 1.0, -3.0, 3.0, 4.0])
    assert binary(outputs, y) == pytest.approx(
        {
            "auroc": 19.5 / 25,
            "auprc": (1 + 1 + 1 + 4 / 5) / 5 + (5 / 10) / 5,
            "accuracy": 8 / 10,
            "f1": 8 / 10,
            "precision": 4 / 5,
            "recall": 4 / 5,
            "loss": np.mean([np.log1p(np.exp(-o if t else o)) for o, t in zip(outputs.tolist(), y, strict=True)]),
        },
        abs=1e-6,
    )


@pytest.mark.parametrize(
    ("negative", "positive", "missing"),
    [
        (12, 0, {"auroc", "auprc", "f1", "recall"}),
        (0, 12, {"auroc", "auprc"}),
        (12, RARE - 1, {"auroc", "auprc"}),
        (RARE - 1, 12, {"auroc", "auprc"}),
        (RARE, RARE, set()),
    ],
)
def test_one_class_or_too_few_of_one_cannot_be_ranked(negative, positive, missing):
    outputs = logits(negative + positive)
    outputs[-1] = 1.0
    assert set(none(binary(outputs, labels(negative, positive)))) == missing


def test_a_model_that_never_says_yes_has_no_precision():
    found = binary(torch.full((20,), -1.0), labels(10, 10))
    assert none(found) == ["precision"] and found["f1"] == 0.0
    assert (found["recall"], found["accuracy"], found["auroc"]) == (0.0, 0.5, 0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [[0], [-1], slice(None)])
def test_of_logits_that_are_not_finite_nothing_is_estimable(value, where):
    outputs = logits(20)
    outputs[where] = value
    assert binary(outputs, labels(10, 10)) == dict.fromkeys(NAMES)


def test_of_an_empty_part_nothing_is_estimable():
    assert binary(torch.zeros(0), torch.zeros(0)) == dict.fromkeys(NAMES)


def test_a_huge_logit_is_no_infinite_loss():
    y = labels(5, 5)
    found = binary(torch.where(y == 1, -3e38, 3e38), y)
    assert found["loss"] == pytest.approx(3e38) and found["auroc"] == 0.0


def test_a_part_that_is_too_small_is_measured_by_no_name():
    recipe = tabular("heart")
    params = {name: p.detach() for name, p in recipe.model().named_parameters()}
    part = Part(torch.randn(12, params["layers.head.weight"].shape[1]), labels(6, 6))
    assert none(evaluate(recipe, params, part, minimum=13)) == NAMES
    assert evaluate(recipe, params, part, minimum=12) == binary(torch.zeros(12), part.y)


@pytest.mark.parametrize("drops", [nn.Dropout(0.9), nn.Identity()], ids=["dropout", "none"])
def test_a_model_is_measured_without_dropout_and_normalised_by_its_batch(drops):
    """Averages that a BatchNorm kept would be those it began with: they do not travel."""
    model = nn.Sequential(nn.BatchNorm1d(3), drops, nn.Linear(3, 1, bias=False))
    recipe = Recipe("made up", None, lambda: model.train(), None, lambda outputs, y: {"all": outputs[:, 0].tolist()})
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)) * 5 + 7
    params = {"0.weight": torch.ones(3), "0.bias": torch.zeros(3), "2.weight": torch.ones(1, 3)}
    expected = ((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()).sum(1)
    assert evaluate(recipe, params, Part(x, torch.zeros(20)))["all"] == pytest.approx(expected.tolist(), abs=1e-4)
