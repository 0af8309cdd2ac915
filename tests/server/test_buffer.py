"""Rounds that do not wait for everybody: a slow site's answer counts later, and less; nobody is asked twice at a time."""

import pytest
from pydantic import ValidationError
from world import VISIT, World

from fedtailor import strategies
from fedtailor.config import load
from fedtailor.errors import ConfigError, WireError
from fedtailor.privacy.planning import resolve
from fedtailor.server import rounds
from fedtailor.server.folding import close_round, discount
from fedtailor.server.vouching import last_of
from fedtailor.study import Buffer, Plan

LATER = VISIT.model_copy(update={"round": 4, "cast_sha256": "1" * 64})


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "time", rounds.time)  # given back afterwards
    return lambda *sites: World(tmp_path, *sites)


def test_a_round_closes_with_what_suffices_and_nobody_is_late(world):
    it, standing, came = world("a", "b", "c"), {}, []
    it.on_push = lambda site, question: site != "c" and it.answer(question)
    for answer in it.ask(standing=standing, enough=lambda: len(came) == 2):
        came.append((answer.site, answer.code))
    assert sorted(came) == [("a", None), ("b", None)] and it.now < 1001
    assert standing.keys() == {"c"} and len(it.pushed) == 3
    assert set(it.pushed) - it.forgotten == set(standing["c"].asked)  # its question still stands


def test_a_late_answer_counts_in_the_round_that_is_open_and_the_site_is_not_asked_before(world):
    it, standing, came = world("a", "c"), {}, []
    it.on_push = lambda site, question: site == "a" and it.answer(question)
    list(it.ask(standing=standing, enough=lambda: bool(it.trees)))
    (late,) = standing["c"].asked
    it.on_push, it.steps = lambda site, question: None, [lambda: None, lambda: it.answer(late, rows=7)]
    for answer in it.ask(visit=LATER, standing=standing, enough=lambda: bool(came)):
        came.append(answer)
    assert [(one.site, one.code, one.visit) for one in came] == [("c", None, VISIT)] and came[0].report.rows == 7
    assert len(it.pushed) == 3 and "to a" in it.pushed[2]  # c was not asked the new question over its old one
    assert standing.keys() == {"a"} and late in it.forgotten
    list(it.ask(visit=LATER, deadline_s=1.0, standing=standing))
    assert "to c" in it.pushed[3] and standing.keys() == {"a", "c"}  # now it is


def test_an_answer_on_its_way_when_a_round_closes_is_read_in_the_next(world):
    it, standing = world("c"), {}
    it.on_push = lambda site, question: it.answer(question, arrived=False)
    assert it.round(deadline_s=1.0, standing=standing) == [] and standing["c"].arriving is not None
    it.coming.clear()
    (one,) = it.ask(visit=LATER, standing=standing)
    assert (one.code, one.visit) == (None, VISIT) and not standing


def test_a_slow_site_that_joins_anew_is_asked_the_open_question(world):
    it, standing = world("c"), {}
    assert it.round(deadline_s=1.0, standing=standing) == []
    it.rejoin("c", "again")
    it.on_push = lambda site, question: it.answer(question)
    (one,) = it.ask(visit=LATER, standing=standing)
    assert one.code is None and one.visit is None and not standing  # an answer to this round's


def test_a_site_that_is_revoked_leaves_nothing_standing(world):
    it, standing = world("c"), {}
    it.round(deadline_s=1.0, standing=standing)
    it.known.pop("c")
    assert it.round(visit=LATER, standing=standing) == [("c", "revoked")] and not standing


def test_a_late_answer_counts_less_and_one_that_is_too_old_does_not_count():
    buffer = Buffer(answers=1, oldest=3)
    assert discount(buffer, 3) == 0.5
    for late, rule in ((4, buffer), (1, None)):
        with pytest.raises(WireError) as error:
            discount(rule, late)
        assert error.value.code == "stale"


def test_the_fold_checks_a_late_answer_against_its_own_round(world, tmp_path):
    """And its witness, which is of another model, is not shown as one of this round's."""
    it, told = world("a", "b"), []
    leaves = it.leaves()
    it.on_push = lambda site, question: it.answer(question, round=3, witness="aa", summand_sha256=it.digest())
    answers = list(it.ask())
    stream = iter([answers[0]._replace(visit=VISIT), answers[1]])
    closed = close_round(strategies.fedavg(), LATER, leaves, stream, told.append, buffer=Buffer(answers=1))
    late = answers[0].site
    assert list(closed.reports) == [late] and closed.dropped == {answers[1].site: "round"}
    assert closed.acc.whole("weight").item() == pytest.approx(10 / 2**0.5)
    last = last_of(LATER, closed.reports)
    assert last.witnesses == {} and [leaf[0] for leaf in last.leaves] == [late]


def test_figures_of_a_sites_own_model_count_only_where_the_strategy_gives_it_one(world):
    for models, kept in ((1, None), (2, {"auroc": 0.9})):
        it = world("a")
        leaves = it.leaves().model_copy(update={"models": models})
        it.on_push = lambda site, question, it=it: it.answer(
            question, personal={"auroc": 0.9}, summand_sha256=it.digest()
        )
        closed = close_round(strategies.fedavg(), VISIT, leaves, it.ask(), lambda answer: None)
        assert closed.reports["a"].personal == kept


def test_a_buffer_must_hold_the_quorum_and_go_round_a_sum():
    base = ["study=heart", "privacy=none", "quorum=2"]
    for answers in (1, 5):
        with pytest.raises(
            (ConfigError, ValidationError), match=f"buffer.answers: {answers} is not from the quorum, 2"
        ):
            load([*base, f"buffer={{answers: {answers}}}"])
    with pytest.raises(ConfigError, match="buffer: a late answer counts less"):
        resolve(load([*base, "buffer={answers: 2}", "strategy=median"]).plan)
    for remembers in ("scaffold", "topk"):
        with pytest.raises(ConfigError, match="buffer: .*as if it had counted whole"):
            resolve(load([*base, "buffer={answers: 2}", f"strategy={remembers}"]).plan)
    resolve(load([*base, "buffer={answers: 2}", "strategy=ditto"]).plan)  # what it remembers is its own
    plan = resolve(load([*base, "buffer={answers: 2}"]).plan)
    assert Plan.parse(plan.canonical()) == plan and plan.buffer.weight(3) == 0.5
