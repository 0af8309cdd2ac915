"""Poisson samples: their distribution, their reproducibility, and what packing makes of them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtailor.batches import draw, pack
from fedtailor.recipe import Part
from fedtailor.study import LocalTraining

N = 40


def local(steps=1, rate=0.3):
    return LocalTraining(steps=steps, rate=rate, lr=0.1)


@pytest.fixture(scope="module")
def many():
    """5000 samples of 40 examples at rate 0.3."""
    return draw(local(steps=5000), N, 0, 0, "va")


def test_the_expected_size_is_rate_times_rows(many):
    assert abs(many.sum(1).mean() - 0.3 * N) < 5 * math.sqrt(N * 0.3 * 0.7 / 5000)


def test_every_example_has_the_same_chance(many):
    assert (many.mean(0) - 0.3).abs().max() < 5 * math.sqrt(0.3 * 0.7 / 5000)


def test_examples_are_drawn_independently_of_one_another(many):
    """A sample of fixed size would have no variance in its size, and negative correlation between examples."""
    assert many.sum(1).var() == pytest.approx(N * 0.3 * 0.7, rel=0.15)
    pairs = torch.corrcoef(many.T) - torch.eye(N)
    assert pairs.abs().max() < 6 / math.sqrt(5000)
    first = many[:, 0] == 1
    rest_with, rest_without = many[first][:, 1:].sum(1).mean(), many[~first][:, 1:].sum(1).mean()
    assert abs(rest_with - rest_without) < 0.6


def test_a_rate_of_one_draws_everything():
    assert bool((draw(local(steps=3, rate=1.0), N, 0, 0, "va") == 1).all())


def test_a_draw_depends_on_its_key_and_not_on_what_was_drawn_before():
    alone = draw(local(steps=3), N, 7, 2, "va")
    torch.manual_seed(123)
    for site in ("hungary", "cleveland"):
        draw(local(steps=5), 99, 7, 2, site)
    assert torch.equal(draw(local(steps=3), N, 7, 2, "va"), alone)
    assert torch.equal(draw(local(steps=9), N, 7, 2, "va")[:3], alone)  # more steps draw the first ones alike


@pytest.mark.parametrize("key", [(8, 2, "va"), (7, 3, "va"), (7, 2, "hungary")])
def test_seed_round_and_site_each_change_it(key):
    assert not torch.equal(draw(local(steps=3), N, *key), draw(local(steps=3), N, 7, 2, "va"))


def test_steps_differ():
    a, b = draw(local(steps=2), N, 0, 0, "va")
    assert not torch.equal(a, b)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4), st.integers(0, 12))
def test_packing_keeps_exactly_what_was_drawn(rows, width):
    mask = torch.tensor(rows).float()
    part = Part(torch.arange(18.0).reshape(9, 2), torch.arange(9.0))
    batches = pack(part, mask, 0.5, width)
    size = max(width, int(mask.sum(1).max()), 2)  # one example has nothing to be normalised by
    assert batches["x"].shape == (len(rows), size, 2) and batches["live"].shape == (len(rows), size)
    for step, drawn in enumerate(mask):
        live = batches["live"][step].bool()
        assert torch.equal(batches["y"][step][live], drawn.nonzero()[:, 0].float())
        assert torch.equal(batches["x"][step][live], part.x[drawn.bool()])


def test_the_divisor_is_the_expected_size_and_says_nothing_of_the_drawn_one():
    part = Part(torch.zeros(9, 2), torch.zeros(9))
    for mask in (torch.zeros(1, 9), torch.ones(1, 9)):
        assert pack(part, mask, 0.5)["scale"].tolist() == pytest.approx([1 / 4.5])


def test_an_empty_sample_is_a_batch_of_padding():
    batches = pack(Part(torch.ones(9, 2), torch.ones(9)), torch.zeros(2, 9), 0.5)
    assert batches["x"].shape == (2, 2, 2) and not batches["live"].any()
