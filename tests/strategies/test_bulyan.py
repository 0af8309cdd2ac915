"""Bulyan by hand, what it withstands, and where Flower's is another algorithm."""

import pytest
import torch
from flwr.serverapp.strategy import Bulyan

from fedtailor.strategies import bulyan, krum


def test_one_coordinate_of_a_reply_that_is_near_otherwise_is_left_out(end):
    """Seven replies, one liar: Krum chooses five, and of those each coordinate keeps the three about its median."""
    honest = torch.randn(6, 100, generator=torch.Generator().manual_seed(0))
    lie = honest.mean(0)  # nearer to all than they are to each other, but for one coordinate
    lie[-1] = 5
    replies = [*honest.tolist(), lie.tolist()]
    assert end(krum(), replies)[-1] == 5
    assert abs(end(bulyan(), replies)[-1]) < 1


def test_each_coordinate_is_the_mean_of_those_about_the_median(end):
    # Krum, by 4, 3, 2, 1, 1 neighbours: 3, then 2, 1, 0 and 6; their median is 2, and the nearest three are 1, 2, 3
    assert end(bulyan(), [[0.0], [1.0], [2.0], [3.0], [6.0], [8.0], [100.0]]) == pytest.approx([2])


@pytest.mark.parametrize("lie", [30.0, -1e20, 3e38])
def test_as_many_liars_as_said_are_left_out(lie, end):
    ended = end(bulyan(attackers=2), [[1.0 + k / 10, 0.0] for k in range(9)] + [[lie, lie]] * 2)
    assert 1.0 <= ended[0] <= 1.8 and abs(ended[1]) < 1e-6


def test_flower_agrees_where_choosing_one_by_one_makes_no_difference(step, flower, start, around):
    """With no attackers both are means of everybody."""
    replies = around(start, 7, rows=range(1, 8))
    ours = step(bulyan(attackers=0), bulyan().init(start), replies)["params"]
    torch.testing.assert_close(ours, flower(Bulyan(), start, replies), rtol=0, atol=1e-6)


def one_by_one(points: list[float], f: int) -> float:
    """Algorithm 2 of the paper on a line: Krum again on what is left after each choice, then the mean about the median.

    Two that are each other's only neighbour tie, which the paper leaves open: here as there, the next one decides.
    """
    rest, chosen = list(points), list[float]()
    while len(chosen) < len(points) - 2 * f:
        apart = {x: sorted((x - y) ** 2 for y in rest)[1:] for x in rest}
        near = max(1, len(rest) - f - 2)
        chosen.append(min(rest, key=lambda x, apart=apart, near=near: (round(sum(apart[x][:near]), 9), apart[x][near])))
        rest.remove(chosen[-1])
    middle = sorted(chosen)[len(chosen) // 2]
    about = sorted(chosen, key=lambda x: abs(x - middle))[: len(chosen) - 2 * f]
    return sum(about) / len(about)


def test_flower_chooses_all_at_once(step, flower):
    """Flower takes the best of one scoring, so that the crowd at 4 fills its choice; the paper scores what is left."""
    start, points = {"w": torch.zeros(1)}, [0.0, 1.0, 2.0, 3.1, 4.0, 4.3, 4.5]
    replies = [({"w": torch.tensor([x])}, 1.0) for x in points]
    ours = step(bulyan(), bulyan().init(start), replies)["params"]["w"].item()
    theirs = flower(Bulyan(num_malicious_nodes=1), start, replies)["w"].item()
    assert ours == pytest.approx(one_by_one(points, 1))
    assert abs(ours - theirs) > 0.5
