"""One round on the server, on a link and a clock of the test's own: who is asked, and who counts."""

import hashlib
import secrets
import threading
from types import SimpleNamespace

import pytest
import torch
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from safetensors.torch import save

from fedtailor import leaving, wire
from fedtailor.errors import WireError
from fedtailor.server import rounds
from fedtailor.server.rounds import answers
from fedtailor.server.superlink import Node, Reply
from fedtailor.wire import Report

SUMMAND = {"delta/w": torch.tensor([1.0, 2.0]), "weight": torch.tensor(10.0)}
SPEC = {name: (x.dtype, tuple(x.shape)) for name, x in SUMMAND.items()}
LIMIT = leaving.size_limit(SPEC)


def report(**changed):
    salt, digest = secrets.token_hex(32), "0" * 64
    fields = {"run": "r", "round": 3, "rows": 20, "train_rows": 10, "summand_sha256": digest, "salt": salt}
    return Report(**fields | changed)


class World:
    """A link to sites whose every step the test decides, the bell between them, and the clock."""

    def __init__(self, spool, *sites):
        self.now, self.spool, self.sites = 1000.0, spool, sites
        self.known = {site: Node(i, True, "first") for i, site in enumerate(sites)}
        self.box, self.shelf, self.trees, self.coming, self.gone = [], {}, {}, {}, set()
        self.pushed, self.forgotten, self.steps, self.ticks = [], set(), [], 0
        self.on_push = lambda site, question: None

    def nodes(self):
        return self.known

    def replies(self, run, waiting):
        assert run == 7
        found = [r for r in self.box if r.reply_to in waiting]
        self.box = [r for r in self.box if r not in found]
        return found

    def objects(self, message_id, most):
        if message_id not in self.trees:
            return None
        if len(self.trees[message_id]) > most:
            raise WireError("too many", code="oversized")
        return self.trees[message_id]

    def missing(self, ids):
        if self.gone & set(ids):
            return None
        return [one for one in ids if self.coming.get(one)]

    def fetch(self, run):
        return self.shelf.__getitem__

    def forget(self, asked, answers):
        self.forgotten |= {*asked, *answers}

    def take_answered(self):
        return True

    def listen(self, timeout):  # time passes only here
        self.now += timeout
        if self.steps:
            self.steps.pop(0)()

    def push(self, nodes, ttl):
        assert ttl > 60
        made = {}
        for node in nodes:
            if (site := self.sites[node]) not in self.known:
                continue
            made[node] = f"question {len(self.pushed)} to {site}"
            self.pushed.append(made[node])
            self.on_push(site, made[node])
        return made

    def rejoin(self, site, when, online=True):
        self.known[site] = self.known[site]._replace(activated_at=when, online=online)

    def answer(self, question, flat=SUMMAND, arrived=True, payload=None, **changed):
        said = report(**changed)
        raw = save(flat) if payload is None else payload
        record = wire.record(said, wire.salted(said.salt)(raw))
        message = make_message(Metadata(7, "", 1, 2, question, "", 1.0, 60.0, "train"), record)
        objects = {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
        self.shelf |= objects
        self.trees[message.object_id] = list(objects)
        self.coming |= {name: not arrived for name in objects}
        self.box.append(Reply(message.object_id, question, None))
        return message.object_id

    def refuse(self, question, code, lost=False):
        self.box.append(Reply(f"refusal of {question}", question, code, lost))

    def round(self, deadline_s=20.0, limit=LIMIT, stop=None):
        def tick():
            self.ticks += 1

        rounds.time = SimpleNamespace(monotonic=lambda: self.now)
        found = answers(
            self, 7, self.push, self.sites, deadline_s=deadline_s, limit=limit, spool=self.spool, tick=tick, bell=self,
            stop=stop or threading.Event(),
        )  # fmt: skip
        return [(a.site, a.code) for a in found]


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
    rounds.time = SimpleNamespace(monotonic=lambda: it.now)
    (one,) = answers(it, 7, it.push, ("a",), deadline_s=9, limit=LIMIT, spool=tmp_path, tick=lambda: None, bell=it,
                     stop=threading.Event())  # fmt: skip
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
