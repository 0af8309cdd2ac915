"""Nearest-neighbour mixing and bucketing: by hand, and what they are for."""

import pytest
import torch

from fedtailor import STACK, Strategy, tree
from fedtailor.strategies import bucketing, fedavg, krum, nnm, trimmed_mean


@pytest.fixture
def passed_on():
    """``passed_on(wrapper, replies, round)``: what the strategy inside is given to see."""

    def run(wrap, replies, round=0):
        seen = []

        def apply(state, total, round):
            seen.append(total)
            return state

        inside: Strategy = fedavg()._replace(apply=apply, reduce=STACK)
        weights = torch.ones(len(replies))
        wrap(inside).apply({}, {"delta": {"w": torch.tensor(replies)}, "weight": weights}, round)
        assert torch.equal(seen[0]["weight"], torch.ones(len(seen[0]["delta"]["w"])))
        return seen[0]["delta"]["w"].tolist()

    return run


def test_each_reply_becomes_the_mean_of_its_nearest(passed_on):
    # four of five each: 0, 1 and 4 are farthest from 50; to 10 and 50 the farthest are 50 and 0
    mixed = passed_on(lambda of: nnm(of, attackers=1), [0.0, 1.0, 4.0, 10.0, 50.0])
    assert mixed == pytest.approx([15 / 4, 15 / 4, 15 / 4, 15 / 4, 65 / 4])


def test_by_direction_a_short_lie_is_near_to_nobody(passed_on):
    """Three replies up and to the sides, and their mean turned round, which by distance is nearer than they are."""
    replies = [[4.0, 1.0], [4.0, -3.0], [3.0, 3.0], [-0.5, -0.1], [0.0, 0.0]]

    def first(**how):
        return passed_on(lambda of: nnm(of, attackers=2, **how), replies)[2]

    assert first(nearest="direction") == pytest.approx([11 / 3, 1 / 3])
    assert first() == pytest.approx([7 / 3, 4 / 3])  # with (0, 0) in the place of (4, -3)


def test_mixing_draws_honest_replies_together(passed_on):
    rng = torch.Generator().manual_seed(0)
    honest = torch.randn(15, 30, generator=rng)
    lies = torch.full((5, 30), 0.8)
    mixed = torch.tensor(passed_on(lambda of: nnm(of, attackers=5), torch.cat([honest, lies]).tolist()))[:15]
    assert mixed.var(0).sum() < 0.2 * honest.var(0).sum()


def test_a_bucket_is_a_mean_and_every_reply_is_in_one(passed_on):
    replies = [1.0, 2.0, 4.0, 8.0, 16.0]
    buckets = passed_on(lambda of: bucketing(of, bucket=2), replies)
    assert len(buckets) == 3
    sums = sorted(2 * b for b in buckets[:2]) + [buckets[2]]  # the last bucket holds one
    assert sum(sums) == pytest.approx(31)
    assert buckets[2] in replies


def test_buckets_change_by_round_and_not_by_arrival(passed_on):
    def wrap(of):
        return bucketing(of, bucket=2)

    replies = [float(2**k) for k in range(8)]
    assert passed_on(wrap, replies, 1) == passed_on(wrap, replies[::-1], 1)
    assert len({tuple(passed_on(wrap, replies, round)) for round in range(8)}) > 5
    assert passed_on(lambda of: bucketing(of, seed=1), replies) != passed_on(wrap, replies)


@pytest.mark.parametrize("wrap", [lambda of: nnm(of, attackers=2), lambda of: bucketing(of, bucket=2)])
@pytest.mark.parametrize("rule", [trimmed_mean(attackers=2), krum(attackers=2)])
def test_a_rule_inside_still_withstands_liars(wrap, rule, end):
    honest = [[1.0 + k / 100, 0.0] for k in range(8)]
    x, y = end(wrap(rule), [[1e9, 1e9], *honest, [1e9, -1e9]])
    assert 1 <= x <= 1.08 and abs(y) < 1e-3


def test_they_go_round_each_other(end):
    ended = end(bucketing(nnm(trimmed_mean(attackers=1), attackers=1), bucket=2), [[float(k)] for k in range(8)])
    assert 2 < ended[0] < 5


def test_replies_are_trees(step, start, around):
    """Mixing everybody with everybody is the mean, tensor by tensor."""
    strategy = nnm(fedavg(), attackers=0)
    replies = around(start, 4)
    mean = tree.map(lambda *xs: torch.stack(xs).mean(0), *[params for params, _ in replies])
    torch.testing.assert_close(step(strategy, strategy.init(start), replies)["params"], mean)
