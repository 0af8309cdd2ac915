"""Rounds on a virtual clock: who is slow answers later and counts less; who has no time takes fewer steps."""

import pytest
import torch

from fedtailor import tree
from fedtailor.errors import ConfigError
from fedtailor.simulations.buffered import steps_within
from fedtailor.simulations.run import simulate
from fedtailor.strategies import fedavg

FIELDS = {"rounds": 4, "evaluation": {"baseline": False}, "quorum": 1}
SLOW = {"west": 7.0}  # a round of two steps takes 14 virtual seconds; the others' take 2


def moved(plan, sources, **more):
    result, params = simulate(plan, sources, **more)
    return result, torch.cat([p.flatten() for p in params.values()])


def test_sites_of_one_speed_are_as_if_there_were_no_buffer(plan, sources):
    waits = moved(plan(**FIELDS), sources)[1]
    buffered = moved(plan(**FIELDS, buffer={"answers": 3}), sources)[1]
    torch.testing.assert_close(waits, buffered)


def test_a_slow_site_counts_in_a_later_round_by_its_weight(plan, sources):
    """With a buffer of two the others close rounds 0 to 3 without it, at 2, 4, 6 and 8 s; the eighth has it in."""
    both = {"sites": ["north", "south", "west"], "buffer": {"answers": 2, "exponent": 0.0}}
    without = moved(plan(**FIELDS, sites=["north", "south"]), sources)[1]
    early = moved(plan(**FIELDS, **both), sources, step_s=SLOW)[1]
    torch.testing.assert_close(early, without)
    longer = FIELDS | {"rounds": 8}
    late = moved(plan(**longer, **both), sources, step_s=SLOW)[1]
    never = moved(plan(**longer, sites=["north", "south"]), sources)[1]
    assert (late - never).norm() > 1e-3
    counts = [both | {"buffer": {"answers": 2, "exponent": exponent}} for exponent in (0.0, 2.0, 60.0)]
    full, less, nothing = (moved(plan(**longer, **one), sources, step_s=SLOW)[1] for one in counts)
    assert 0 < (less - nothing).norm() < 0.2 * (full - nothing).norm()  # 8 ** -2 of its weight


def test_an_answer_that_is_too_old_is_dropped_by_name(plan, sources):
    made = plan(**FIELDS | {"rounds": 10}, buffer={"answers": 2, "oldest": 3})
    result, _ = moved(made, sources, step_s=SLOW)  # and it is not asked again before it has answered
    assert result.dropped == [{"round": 7, "site": "west", "code": "stale"}]


def test_a_quorum_must_answer_the_rounds_own_question(plan, sources):
    """Two answers suffice by the buffer, but a round may not close on old ones alone."""
    made = plan(**FIELDS | {"quorum": 3, "rounds": 2}, buffer={"answers": 3})
    waits = moved(made, sources, step_s=SLOW)[1]
    torch.testing.assert_close(waits, moved(plan(**FIELDS | {"rounds": 2}), sources)[1])
    two = plan(**FIELDS | {"quorum": 2, "rounds": 3}, buffer={"answers": 2})
    assert moved(two, sources, step_s={"west": 1.25})[0].rounds == 3  # at 2.5 s and 4 s two are there, one of them late
    with pytest.raises(ConfigError, match="round 0: 2 of 3 sites replied, the quorum is 3, within deadline_s=5"):
        simulate(made.model_copy(update={"deadline_s": 5.0}), sources, step_s=SLOW)


def test_who_has_no_time_takes_fewer_steps(plan, sources):
    made = plan(**FIELDS, local={"steps": 6, "rate": 0.4, "lr": 0.3, "within_s": 3.5})
    assert steps_within(made, torch.tensor([0.1, 1.0, 2.0, 9.0])).tolist() == [6, 4, 2, 1]
    partial = moved(made, sources, step_s=SLOW)[1]
    assert (partial - moved(made, sources)[1]).norm() > 1e-3
    assert made.local.within_s and steps_within(plan(**FIELDS), torch.tensor([99.0])).tolist() == [2]


def test_fedavg_of_late_answers_is_a_weighted_mean():
    """Of updates 1 (fresh) and 3 (three rounds late, so half): (1 + 3 / 2) / (1 + 1 / 2)."""
    strategy, total = fedavg(weighting="equal"), None
    for change, weight in ((1.0, 1.0), (3.0, 0.5)):
        summand = {"delta": {"w": torch.tensor([change])}, "weight": torch.tensor([1.0])}
        total = strategy.reduce.add(total, tree.map(lambda x, w=weight: x * w, summand))
    after = strategy.apply({"params": {"w": torch.tensor(0.0)}}, strategy.reduce.done(total), 0)
    assert after["params"]["w"].item() == pytest.approx(2.5 / 1.5)
