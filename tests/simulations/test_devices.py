"""Devices of a simulated population: who is slow, who is lost, and how long rounds last by the virtual clock."""

import numpy as np
import pytest
import torch
from scipy import stats

from fedtailor.errors import RefusedError
from fedtailor.population import Population
from fedtailor.simulations.devices import answers, trips
from fedtailor.simulations.run import simulate

QUIET = {"evaluation": {"baseline": False}}


def answered(plan, of, round, asked):
    return answers(plan, list(asked), trips(plan, of, round, list(asked)))


def people(cohort=20, **more):
    return Population(partition="iid", clients=40, cohort=cohort, **more)


def test_speeds_are_lognormal_and_a_devices_own(plan):
    of = people(step_s=2.0, step_spread=0.5)
    one, other = (answered(plan(deadline_s=1e6), of, round, range(400)) for round in (0, 7))
    assert one.lasts == other.lasts > 0 and len(one.clients) == 400
    lasts = [answered(plan(deadline_s=1e6), of, 0, [k]).lasts for k in range(400)]
    assert stats.kstest(np.log(np.array(lasts) / (2 * 2.0)) / 0.5, "norm").pvalue > 1e-4  # of two steps


def test_who_is_lost_is_drawn_for_each_round(plan):
    of = people(dropout=0.3)
    lost = [set(range(400)) - set(answered(plan(), of, round, range(400)).clients) for round in (0, 1)]
    assert all(stats.binomtest(len(some), 400, 0.3).pvalue > 1e-4 for some in lost)
    assert 15 < len(lost[0] & lost[1]) < 60, "two rounds have nothing to do with each other"
    assert answered(plan(), of, 0, range(400)).lasts is None


def test_a_round_ends_with_the_last_answer_or_at_its_deadline(plan):
    of, asked = people(step_s=2.0, step_spread=0.5), range(40)
    seconds = {k: answered(plan(deadline_s=1e6), of, 0, [k]).lasts for k in asked}
    whole = answered(plan(deadline_s=1e6), of, 0, asked)
    assert whole.lasts == pytest.approx(max(seconds.values())) and whole.clients == list(asked)
    cut = answered(plan(deadline_s=4.0), of, 0, asked)
    assert (
        cut.lasts == 4.0
        and cut.clients == [k for k in asked if seconds[k] <= 4.0]
        and len(cut.taken) == len(cut.clients)
    )
    assert 10 < len(cut.clients) < 30
    none = answered(plan(deadline_s=0.01), of, 0, asked)
    assert none.clients == [] and none.lasts == 0.01
    sharp = answered(
        plan(deadline_s=4.0), people(step_s=2.0), 0, asked
    )  # two steps each: done at the deadline is in time
    assert sharp.clients == list(asked) and sharp.lasts == 4.0
    some = answered(plan(deadline_s=9.0), people(step_s=2.0, dropout=0.3), 0, asked)
    assert len(some.clients) < 40 and some.lasts == 9.0, "nobody knows before that no more will come"


def test_who_has_no_time_takes_fewer_steps(plan):
    made = plan(deadline_s=1e6, local={"steps": 6, "rate": 0.4, "lr": 0.3, "within_s": 3.0})
    found = answered(made, people(step_s=1.0, step_spread=1.0), 0, range(40))
    assert found.taken.min() == 1 and found.taken.max() == 6 and len(found.taken.unique()) > 3


def test_only_those_who_answer_count_and_the_clock_is_in_the_result(plan, sources):
    of = people(cohort=40, step_s=2.0, step_spread=0.5)
    made = plan(**QUIET, rounds=2, deadline_s=4.0)
    result, params = simulate(made, sources, population=of)
    assert result.timing.virtual_s == [4.0, 4.0]
    unhurried, everybody = simulate(made, sources, population=people(cohort=40))
    assert unhurried.timing.virtual_s == []
    assert any(not torch.allclose(params[name], everybody[name], atol=1e-4) for name in params)
    for how in ({"block": 3}, {"path": "vmap"}, {"workers": 2}):
        again = simulate(made, sources, population=of, **how)[1]
        assert all(torch.allclose(params[name], again[name], atol=1e-6) for name in params)


def test_a_round_that_nobody_answers_ends_the_simulation(plan, sources):
    made = plan(**QUIET, deadline_s=3.0)
    with pytest.raises(RefusedError, match="round [0-9]+: nobody answers; ask more clients, or wait longer"):
        simulate(made, sources, population=people(cohort=1, dropout=0.6))
