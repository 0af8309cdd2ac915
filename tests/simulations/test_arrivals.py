"""Rounds of a population that wait for nobody: who begins when, with which model, and what is made of the answers."""

import math

import numpy as np
import pytest
import torch
from interrupt import interrupted_after
from scipy import stats

from fedtailor import tree
from fedtailor.errors import RefusedError
from fedtailor.population import Population
from fedtailor.result import model_bytes
from fedtailor.simulations.arrivals import flow, folded
from fedtailor.simulations.buffered import Answer, Clock
from fedtailor.simulations.devices import Trips
from fedtailor.simulations.draws import drawn_of, everybody
from fedtailor.simulations.run import advanced, simulate
from fedtailor.simulations.setting import prepare
from fedtailor.strategies import fedavg

FIELDS = {"evaluation": {"baseline": False}, "quorum": 1, "deadline_s": 1000}


def people(clients=30, cohort=6, answers=4, **more):
    return Population(
        partition="iid", clients=clients, cohort=cohort, answers=answers, **{"step_s": 1.0, "step_spread": 0.8} | more
    )


def ready(plan, sources, of):
    how = {"block": 64, "path": "auto", "policies": None, "step_s": None}
    return prepare(plan, sources, **how, population=of, on_event=lambda event: None)


def stages(rounds, plan, takes, fills, slots, lost=()):
    """Rounds of clients that are drawn in the order of their numbers, each of whom takes so long."""
    waiting = list(range(len(takes)))

    def draw(round, nth, count, without, now):
        assert not without & set(waiting)
        return [waiting.pop(0) for _ in range(min(count, len(waiting)))]

    def trip(round, asked, now):
        seconds = torch.tensor([takes[k] for k in asked], dtype=torch.double)
        return Trips(
            torch.full((len(asked),), 2.0), seconds, torch.tensor([k in lost for k in asked], dtype=torch.bool)
        )

    clock, found = Clock(0.0), []
    for round in range(rounds):
        found.append(flow(plan, fills, slots, draw, trip, round, clock))
        clock = found[-1].clock
    return found


def said(answers):
    return [(one.due, one.client, one.round) for one in answers]


def test_who_begins_when_and_what_comes_in_which_round(plan):
    """By hand: 1 comes at 2 and 2 begins; 0 at 4 closes round 0 and 3 begins in the next; 2 and 3 come at 5."""
    first, second, third = stages(3, plan(**FIELDS, buffer={"answers": 2}), [4, 2, 3, 1, 9, 9], fills=2, slots=2)
    assert said(first.came) == [(2, 1, 0), (4, 0, 0)] and first.begun == [0, 1, 2]
    assert first.clock.now == 4 and said(first.clock.coming) == [(5, 2, 0)]
    assert said(second.came) == [(5, 2, 0), (5, 3, 1)] and second.begun == [3] and second.clock == Clock(5)
    assert third.begun == [4, 5] and third.clock.now == 14


def test_a_late_answer_counts_less_and_its_weight_too(plan):
    """Of a change of 6, a round late, and of one of 2: (6 / sqrt 2 + 2) / (1 / sqrt 2 + 1); one on its way is kept."""
    made, strategy = plan(**FIELDS, buffer={"answers": 2}), fedavg(weighting="equal")

    def summand(change):
        return {"delta": {"w": torch.tensor([change])}, "weight": torch.ones(1)}

    late, on_time = Answer(5.0, 2, 0, summand(6.0)), Answer(5.0, 3, 1, {})
    going = stages(1, made, [1, 1, 7], fills=2, slots=3)[0]._replace(
        came=(late, on_time),
        old=(Answer(4.0, 9, 0, summand(1e9)),),
        clock=Clock(5.0, (Answer(7.0, 4, 1, {}), Answer(8.0, 5, 1, {}, lost=True))),
    )
    fresh = {3: summand(2.0), 4: summand(9.0)}
    after, clock, old = folded(made, strategy, {"params": {"w": torch.tensor(0.0)}}, 1, going, fresh)
    root = math.sqrt(2)
    assert after["params"]["w"].item() == pytest.approx((6 / root + 2) / (1 / root + 1), rel=1e-6)
    assert clock.coming[0].summand["delta"]["w"] == 9 and clock.coming[1].summand == {}
    assert old == [{"round": 1, "site": "client 9", "code": "stale"}]


def test_who_is_lost_or_too_slow_is_given_up_at_the_deadline(plan):
    """0 is lost and 1 would take 30 s: both are given up at 10 s, and 4 and 5 take their places."""
    made = plan(**FIELDS | {"deadline_s": 10}, buffer={"answers": 2, "oldest": 1})
    first, second, third = stages(3, made, [2, 30, 7, 9, 8, 9], fills=2, slots=3, lost=(0,))
    assert said(first.came) == [(7, 2, 0)] and first.clock.now == 10, "it closes at its deadline with what there is"
    assert first.begun == [2, 3, 4, 5] and said(first.clock.coming) == [(16, 3, 0), (18, 4, 0), (19, 5, 0)]
    assert said(second.came) == [(16, 3, 0), (18, 4, 0)] and second.begun == []
    assert third.came == () and said(third.old) == [(19, 5, 0)], "two rounds late"


def test_one_speed_and_a_buffer_of_all_is_as_if_rounds_waited(plan, sources):
    of = people(clients=12, cohort=12, answers=12, step_spread=0.0)
    waits = simulate(plan(**FIELDS), sources, population=of.model_copy(update={"answers": None}))
    buffered = simulate(plan(**FIELDS, buffer={"answers": 3}), sources, population=of)
    assert waits[0].timing.virtual_s == buffered[0].timing.virtual_s == [2.0, 2.0, 2.0]
    for name, x in waits[1].items():
        torch.testing.assert_close(buffered[1][name], x, rtol=1e-5, atol=1e-6)


def test_each_trains_from_the_model_that_it_began_with(plan, sources):
    """Again, one client at a time, from the models of all rounds: what blocks, memories and the clock make of it is equal."""
    made = plan(**FIELDS, rounds=7, buffer={"answers": 3, "exponent": 1.0, "oldest": 2})
    study = ready(made, sources, people(dropout=0.1))
    at, states, late, most = study.begin(), [], 0, 0
    for round in range(7):
        states.append(at.state)
        going, acc = study.clients.flow(round, at.clock), None
        for one in going.came:
            cast = study.strategy.broadcast(states[one.round])
            alone = study.way.many(cast, {}, *study.clients.fed(one.round, [one.client]))[0]
            weight = 1 / (1 + round - one.round)
            acc = study.strategy.reduce.add(acc, tree.map(lambda x, w=weight: x * w, alone))
            late += one.round < round
        assert round - min(one.round for one in going.came) <= 2 and len(going.came) == 4
        at, before = advanced(study, at, lambda event: None), at
        assert at.clock.now == going.clock.now > before.clock.now
        busy = [one.client for one in at.clock.coming]
        assert len(busy) == len(set(busy)) < 6, "the last to answer has not been replaced yet"
        most = max(most, len(busy))
        expected = study.strategy.apply(states[-1], study.strategy.reduce.done(acc), round)
        for a, b in zip(tree.leaves(at.state), tree.leaves(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert late >= 3 and most == 5


@pytest.mark.parametrize(
    "how",
    [
        {"block": 1},
        *[pytest.param(h, marks=pytest.mark.slow) for h in ({"block": 3}, {"path": "loop"}, {"workers": 2})],
    ],
)
def test_blocks_and_ways_do_not_show(plan, sources, how):
    made = plan(**FIELDS, strategy={"_target_": "fedtailor.strategies.ditto"}, rounds=5, buffer={"answers": 3})
    result, params = simulate(made, sources, population=people())
    again, same = simulate(made, sources, population=people(), **how)
    assert result.timing.virtual_s == again.timing.virtual_s and len(result.timing.virtual_s) == 5
    assert all(torch.allclose(params[name], same[name], atol=1e-6) for name in params)


@pytest.mark.parametrize(
    "privacy", [None, pytest.param({"epsilon": 3.0, "delta": 1e-4, "clip": 1.0}, marks=pytest.mark.slow)]
)
def test_a_run_goes_on_from_its_checkpoint(plan, sources, tmp_path, privacy):
    made = plan(**FIELDS, privacy=privacy, rounds=6, buffer={"answers": 3, "oldest": 1})
    of = people(cohort=8, dropout=0.2, step_spread=1.2)
    whole, params = simulate(made, sources, population=of)
    at = {"checkpoint": tmp_path / "checkpoint", "every_s": 0.0, "population": of}
    with pytest.raises(KeyboardInterrupt):
        simulate(made, sources, **at, on_event=interrupted_after(3))
    again, same = simulate(made, sources, **at, resume=True)
    assert model_bytes(same) == model_bytes(params) and again.timing.virtual_s == whole.timing.virtual_s
    assert again.dropped == whole.dropped and {one["site"][:7] for one in whole.dropped} == {"client "}
    if privacy:  # who begins at most once in a round trains at most once a round
        assert 2.9 < again.privacy.epsilon_max <= 3


def test_a_client_begins_once_in_a_round(plan, sources):
    """Eight clients, of whom four train at any time and who are drawn anew all the time."""
    made = plan(**FIELDS, buffer={"answers": 3})
    of = people(clients=8, cohort=4, answers=6, step_spread=1.5)
    study, clock, seen, again = ready(made, sources, of), Clock(0.0), set(), 0
    for round in range(20):
        going = study.clients.flow(round, clock)
        assert len(going.came) == 6
        for one in going.came:  # at most one it was busy with, and one of this round's model
            assert (one.client, one.round) not in seen, "its second answer would be its first again"
            seen.add((one.client, one.round))
        again += 6 - len({one.client for one in going.came})
        clock = going.clock
        assert len(clock.coming) == len({one.client for one in clock.coming}), "who trains does not begin"
    assert again > 0


def test_draws_are_uniform_over_those_who_can(plan):
    counts = np.zeros(12, int)
    for seed in range(1000):
        found = drawn_of(everybody(12), 3, {0, 5, 11}, np.random.default_rng(seed), lambda some: [k != 7 for k in some])
        assert found == sorted(set(found)) and len(found) == 3
        counts[found] += 1
    assert not counts[[0, 5, 7, 11]].any()
    # three of eight are drawn without repeats: the counts vary less than independent ones, so that the test is safe
    assert stats.chisquare(counts[[1, 2, 3, 4, 6, 8, 9, 10]]).pvalue > 1e-4
    rng = np.random.default_rng(0)
    assert drawn_of(everybody(4), 9, {2}, rng, lambda some: [True] * len(some)) == [0, 1, 3]
    assert drawn_of(everybody(4), 2, {0, 1, 2, 3}, rng, lambda some: [True] * len(some)) == []
    many = drawn_of(everybody(10**9), 1000, set(range(500)), rng, lambda some: [True] * len(some))
    assert len(many) == 1000 and max(many) > 9 * 10**8


def test_nobody_without_rows_is_drawn_and_nobody_answers_is_an_end(plan, sources):
    made = plan(**FIELDS, buffer={"answers": 3})
    of = Population(
        partition="dirichlet_split", clients=100, cohort=20, alpha=0.05, minimum=0, step_s=1.0, step_spread=0.5
    )
    study = ready(made, sources, of)
    assert all(int(study.clients.fed(0, [k]).counts) for k in study.clients.flow(0, Clock(0.0)).begun)
    with pytest.raises(RefusedError, match="round [0-9]+: nobody answers; ask more clients, or wait longer"):
        simulate(made, sources, population=people(clients=2, cohort=2, answers=1, dropout=0.9))
