"""One round on the server, on a link and a clock of the test's own: who is asked, and who counts."""

import hashlib
import threading

import pytest
from safetensors.torch import save
from world import LIMIT, SUMMAND, World

from fedtailor.server import rounds


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "time", rounds.time)  # given back afterwards
    return lambda *sites: World(tmp_path, *sites)


def test_each_site_is_asked_and_answered_once(world):
    it = world("a", "b", "c")
    it.on_push = lambda site, question: it.answer(question)
    assert sorted(it.round()) == [("a", None), ("b", None), ("c", None)]
    assert len(it.pushed) == 3 and it.ticks and it.now < 1001
    assert it.forgotten == {*it.pushed, *it.trees}  # nothing stays on the server


def test_a_complete_answer_is_on_disk_as_it_came(world, tmp_path):
    it = world("a")
    it.on_push = lambda site, question: it.answer(question, rows=33)
    (one,) = it.ask()
    assert one.report.rows == 33 and one.size > one.path.stat().st_size == len(save(SUMMAND))
    assert one.path.read_bytes() == save(SUMMAND) and one.digest == hashlib.sha256(save(SUMMAND)).hexdigest()


def test_a_sites_code_word_is_its_answer(world):
    it = world("a", "b")
    it.on_push = lambda site, question: it.refuse(question, "budget" if site == "a" else "x" * 1000)
    assert sorted(it.round()) == [("a", "budget"), ("b", "x" * 64)]
    assert it.forgotten >= set(it.pushed)


def test_a_site_that_was_asked_is_late_and_one_that_never_joined_is_away(world):
    it = world("a", "b")
    it.rejoin("b", "never", online=False)
    assert it.round() == [("a", "late"), ("b", "away")]
    assert len(it.pushed) == 1 and it.now >= 1020 and it.forgotten == set(it.pushed)


def test_a_site_that_was_away_is_asked_when_it_joins(world):
    it = world("a")
    it.rejoin("a", "never", online=False)
    it.steps = [lambda: None, lambda: None, lambda: it.rejoin("a", "now")]
    it.on_push = lambda site, question: it.answer(question)
    assert it.round() == [("a", None)] and len(it.pushed) == 1


def test_a_site_that_joins_anew_is_asked_again_and_either_answer_counts(world):
    for which in (0, 1):
        it = world("a")
        it.steps = [lambda it=it: it.rejoin("a", "again")] + [lambda: None] * 3
        it.steps.append(lambda it=it, which=which: it.answer(it.pushed[which]))
        assert it.round() == [("a", None)] and len(it.pushed) == 2
        assert it.forgotten == {*it.pushed, *it.trees}


@pytest.mark.parametrize("second", ["error", "content"])
def test_a_site_that_answers_twice_at_once_counts_once(world, second):
    it = world("a")

    def both():
        it.refuse(it.pushed[0], "first")
        it.refuse(it.pushed[1], "second") if second == "error" else it.answer(it.pushed[1])

    it.steps = [lambda: it.rejoin("a", "again"), lambda: None, lambda: None, both]
    assert it.round() == [("a", "first")]
    assert it.forgotten >= {*it.pushed, *it.trees}


def test_what_flower_lost_is_asked_again(world):
    it = world("a")
    it.on_push = lambda site, question: (
        it.answer(question) if len(it.pushed) > 1 else it.refuse(question, "node unavailable", lost=True)
    )
    assert it.round() == [("a", None)] and len(it.pushed) == 2
    assert it.forgotten == {*it.pushed, *it.trees}  # also the question that was lost: it holds a whole cast


def test_an_upload_that_was_given_up_is_asked_again(world):
    it = world("a")
    it.on_push = lambda site, question: it.answer(question, arrived=len(it.pushed) > 1)
    it.steps = [lambda: None, lambda: it.gone.update(next(iter(it.trees.values()))[:1])]
    it.steps += [lambda: it.gone.clear()]
    assert it.round() == [("a", None)] and len(it.pushed) == 2
    assert it.forgotten == {*it.pushed, *it.trees}


def test_an_answer_that_is_gone_before_it_is_read_is_asked_again(world):
    it = world("a")
    it.on_push = lambda site, question: it.answer(question)
    it.objects = lambda message_id, most: None if len(it.pushed) == 1 else it.trees[message_id]
    assert it.round() == [("a", None)] and len(it.pushed) == 2 and it.forgotten >= set(it.pushed)


def test_an_answer_counts_when_its_last_object_has_come(world):
    it = world("a")
    it.on_push = lambda site, question: it.answer(question, arrived=False)
    it.steps = [lambda: None, lambda: it.coming.clear()]
    assert it.round() == [("a", None)] and it.now == pytest.approx(1000.6)


def test_an_answer_that_is_still_on_its_way_at_the_deadline_is_late_and_forgotten(world):
    it = world("a")
    it.on_push = lambda site, question: it.answer(question, arrived=False)
    assert it.round() == [("a", "late")]
    assert it.forgotten == {*it.pushed, *it.trees}


def test_an_oversized_or_malformed_answer_is_named_and_forgotten(world):
    it = world("big", "many", "head", "run")

    def hostile(site, question):
        if site == "big":
            it.answer(question, payload=bytes(LIMIT + 1))
        elif site == "many":
            it.trees[it.answer(question)] = ["x"] * 1000
        elif site == "head":
            name = it.answer(question, metrics={"loss": 1.0})
            config = next(k for k in it.trees[name] if it.shelf[k].startswith(b"ConfigRecord"))
            it.shelf[config] = it.shelf[config].replace(b"metrics", b"METRICS")
        else:
            it.answer(question)

    it.on_push = hostile
    found = dict(it.round())
    assert found == {"big": "oversized", "many": "oversized", "head": "head", "run": None}
    assert it.forgotten == {*it.pushed, *it.trees}


def test_a_round_that_is_stopped_ends_without_calling_anybody_late(world):
    it, stop = world("a", "b"), threading.Event()
    it.on_push = lambda site, question: site == "a" and it.answer(question)
    it.steps = [lambda: None, stop.set]
    assert it.round(stop=stop) == [("a", None)]
    assert it.forgotten == {*it.pushed, *it.trees}


def test_nobody_waits_for_a_site_that_was_revoked(world):
    it = world("a", "b")
    it.on_push = lambda site, question: site == "a" and it.answer(question)
    it.steps = [lambda: None, lambda: it.known.pop("b")]
    assert it.round() == [("a", None), ("b", "revoked")] and it.now < 1002
    assert it.forgotten == {*it.pushed, *it.trees}


def test_a_site_that_is_revoked_while_it_is_asked_is_not_waited_for(world):
    it = world("a", "b")
    it.on_push = lambda site, question: it.answer(question)
    seen, it.nodes = dict(it.known), lambda: seen if it.known.pop("b", None) else it.known  # revoked after the look
    assert it.round() == [("a", None), ("b", "revoked")] and len(it.pushed) == 1 and it.now < 1002
