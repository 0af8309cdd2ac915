"""The split: by subject, stratified, and the same whatever the order of the rows."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtailor.contract import Row
from fedtailor.errors import ContractError
from fedtailor.recipes.splits import held_out


def people(negative, positive, visits=1):
    return [
        Row((float(i), float(visit)), float(i >= negative), f"p{i}")
        for i in range(negative + positive)
        for visit in range(visits)
    ]


def nameless(rows):
    return [row._replace(subject=None) for row in rows]


def share(rows, test, label):
    return sum(held for row, held in zip(rows, test, strict=True) if row.label == label)


@given(st.integers(0, 5), st.integers(0, 99), st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_order_of_rows_does_not_show(seed, shuffle, named):
    rows = people(20, 11, visits=2)
    rows = rows if named else nameless(rows)
    expected = dict(zip(rows, held_out(rows, 0.3, seed), strict=True))
    mixed = random.Random(shuffle).sample(rows, len(rows))
    assert dict(zip(mixed, held_out(mixed, 0.3, seed), strict=True)) == expected


def test_equal_rows_without_a_subject_are_people_of_their_own():
    rows = [Row((1.0,), 0.0, None)] * 50 + [Row((1.0,), 1.0, None)] * 30
    test = held_out(rows, 0.3, 0)
    assert (share(rows, test, 0.0), share(rows, test, 1.0)) == (15, 9)
    again = held_out(rows[::-1], 0.3, 0)
    assert (share(rows[::-1], again, 0.0), share(rows[::-1], again, 1.0)) == (15, 9)


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=40, max_size=80), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_all_rows_of_a_subject_are_on_one_side(visits, seed):
    rows = [Row((float(i),), float(sick), f"p{who}") for i, (who, sick) in enumerate(visits)]
    sides = {}
    try:
        test = held_out(rows, 0.5, seed)
    except ContractError:
        return  # a subject or two have nearly all rows
    for row, held in zip(rows, test, strict=True):
        sides.setdefault(row.subject, set()).add(held)
    assert all(len(side) == 1 for side in sides.values()) and len(rows) > sum(test) > 1


@pytest.mark.parametrize("fraction", [0.1, 0.33, 0.5, 0.9])
@pytest.mark.parametrize(("negative", "positive"), [(40, 40), (97, 23), (200, 7)])
def test_each_label_gives_its_share(fraction, negative, positive):
    rows = people(negative, positive)
    test = held_out(rows, fraction, 0)
    assert share(rows, test, 0.0) == round(fraction * negative)
    assert share(rows, test, 1.0) == round(fraction * positive)


@pytest.mark.parametrize("seed", range(5))
def test_a_subject_who_was_ever_positive_is_stratified_as_positive(seed):
    rows = people(30, 10, visits=1)
    later = [row._replace(label=0.0, values=(99.0, 99.0)) for row in rows if row.label]
    test = dict(zip([*rows, *later], held_out([*rows, *later], 0.3, seed), strict=True))
    assert sum(test[row] for row in rows if row.label) == sum(test[row] for row in later) == 3
    assert sum(test[row] for row in rows if not row.label) == 9


def test_a_seed_draws_others_and_the_draw_is_not_by_name():
    rows = people(50, 50)
    drawn = [tuple(held_out(rows, 0.3, seed)) for seed in range(20)]
    assert len(set(drawn)) == 20 and drawn[0] == tuple(held_out(rows, 0.3, 0))
    often = [sum(test[i] for test in drawn) for i in range(100)]
    assert max(often) <= 15 and min(often) <= 4, "each has 0.3 * 20 = 6 chances, not all or none"


def test_who_is_held_out_is_known():
    """By hand: SHA-256 of "0", NUL and the name, smallest first. A change would mix training and test of old runs."""
    test = held_out(people(6, 4), 0.5, 0)
    assert [i for i, held in enumerate(test) if held] == [1, 2, 3, 8, 9]


@pytest.mark.parametrize(
    ("rows", "fraction", "words"),
    [
        ([], 0.3, "0 rows split into 0 for training and 0 for testing"),
        (people(1, 1), 0.5, "2 rows split into 2 for training and 0 for testing"),
        (people(3, 0), 0.33, "3 rows split into 2 for training and 1 for testing"),
        (people(3, 0), 0.67, "3 rows split into 1 for training and 2 for testing"),
        (people(40, 0), 0.01, "40 rows split into 40 for training and 0 for testing"),
        (people(40, 0), 0.99, "40 rows split into 0 for training and 40 for testing"),
    ],
)
def test_too_few_rows_for_two_sides_are_refused(rows, fraction, words):
    with pytest.raises(ContractError, match=words + "; each side needs at least two: more data, or another"):
        held_out(rows, fraction, 0)


def test_two_rows_on_each_side_are_enough():
    assert sum(held_out(people(2, 2), 0.5, 0)) == 2
