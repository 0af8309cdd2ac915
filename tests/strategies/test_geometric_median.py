"""The geometric median: known points, and what it withstands."""

import math

import pytest
import torch

from fedtailor.strategies import geometric_median


def test_of_a_triangle_it_is_fermats_point(end):
    """The point that sees every side of an equilateral triangle at 120 degrees: its centre. And of a flatter one."""
    assert end(geometric_median(), [[0.0, 0.0], [2.0, 0.0], [1.0, math.sqrt(3)]]) == pytest.approx(
        [1, 1 / math.sqrt(3)]
    )
    # base 2, height h: Fermat's point lies 1 / sqrt(3) above the base, whatever h is, if that is above it
    assert end(geometric_median(), [[0.0, 0.0], [2.0, 0.0], [1.0, 9.0]]) == pytest.approx(
        [1, 1 / math.sqrt(3)], abs=1e-5
    )


def test_on_a_line_of_an_odd_number_it_is_the_median(end):
    assert end(geometric_median(), [[0.0], [1.0], [2.0], [50.0], [60.0]]) == pytest.approx([2], abs=1e-4)


def test_it_minimises_the_sum_of_distances(end):
    rng = torch.Generator().manual_seed(1)
    points = torch.randn(9, 5, generator=rng)
    found = torch.tensor(end(geometric_median(), points.tolist()))
    total = (points - found).norm(dim=1).sum()
    for _ in range(200):
        other = found + 0.02 * torch.randn(5, generator=rng)
        assert (points - other).norm(dim=1).sum() > total - 1e-6


def test_a_large_smoothing_makes_it_the_mean(end):
    assert end(geometric_median(smoothing=1e6), [[0.0], [1.0], [5.0]]) == pytest.approx([2], abs=1e-6)


@pytest.mark.parametrize("lie", [1e3, 1e12, -3e37])
def test_a_minority_far_away_hardly_moves_it(lie, end):
    x, y = end(geometric_median(), [[lie, lie], [1.0, 0.0], [1.1, 0.1], [0.9, 0.0], [lie, lie]])
    assert abs(x - 1) < 0.2 and abs(y) < 0.2
