"""Trees: laws that every algorithm leans on."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtailor import tree

NAMES = st.text("abcdefgh.", min_size=1, max_size=4)
FLOATS = st.floats(-1e3, 1e3, width=32)
LEAVES = st.lists(FLOATS, min_size=1, max_size=4).map(torch.tensor)
TREES = st.dictionaries(
    NAMES, st.recursive(LEAVES, lambda below: st.dictionaries(NAMES, below, min_size=1, max_size=3)), min_size=1
)
MANY = settings(deadline=None, max_examples=40)


@MANY
@given(TREES)
def test_flattening_loses_nothing(made):
    back = tree.unflatten(tree.flatten(made))
    assert tree.flatten(back).keys() == tree.flatten(made).keys()
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(back), tree.leaves(made), strict=True))


@MANY
@given(TREES)
def test_map_keeps_the_structure_and_composes(made):
    twice = tree.map(lambda x: x + 1, tree.map(lambda x: 2 * x, made))
    once = tree.map(lambda x: 2 * x + 1, made)
    assert tree.flatten(twice).keys() == tree.flatten(made).keys()
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(twice), tree.leaves(once), strict=True))


@MANY
@given(TREES)
def test_the_norm_is_the_norm_of_all_numbers(made):
    together = torch.cat([x.double().flatten() for x in tree.leaves(made)])
    torch.testing.assert_close(tree.norm(made), together.norm())


@MANY
@given(TREES, st.floats(1e-3, 1e3))
def test_clipping_bounds_the_norm_and_spares_the_small(made, bound):
    clipped = tree.clip(made, bound)
    assert tree.norm(clipped) <= bound * (1 + 1e-6)
    if tree.norm(made) <= bound * (1 - 1e-6):
        for a, b in zip(tree.leaves(clipped), tree.leaves(made), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_clipped_to_zero_as_a_whole(bad):
    clipped = tree.clip({"w": torch.tensor([1.0, bad]), "b": torch.tensor(3.0)}, 1e9)
    assert tree.norm(clipped) == 0


def test_a_norm_beyond_float32_is_clipped_all_the_same():
    clipped = tree.clip({"w": torch.full((4,), 3e38)}, 1.0)
    assert tree.norm(clipped) == pytest.approx(1.0)


def test_stacking_and_indexing_are_inverse():
    trees = [{"a": {"w": torch.full((2,), float(k))}} for k in range(3)]
    stacked = tree.stack(trees)
    assert stacked["a"]["w"].shape == (3, 2)
    assert all(torch.equal(tree.at(stacked, k)["a"]["w"], trees[k]["a"]["w"]) for k in range(3))
    assert tree.at(trees[0], None)["a"]["w"].shape == (1, 2)


def test_trees_of_different_structure_are_refused():
    with pytest.raises(KeyError, match="b"):
        tree.map(torch.add, {"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1)})
