"""The inbox and the outbox: all of a message or none of it, whenever the daemon is killed."""

import itertools
import os
import stat
import sys
import time
from pathlib import Path

import pytest

from fedtailor import store
from fedtailor.client import inbox
from fedtailor.client.fleet import Envelope
from fedtailor.wire import Report, Visit

ENVELOPE = Envelope(flower_run=7, message_id="ab" * 32, created_at=1000.25, ttl=60.0, received_at=2000.5)
LISTED = {"norm": 1.5}
VISIT = Visit(run="r", round=5, train=True, evaluate=True, baseline=False, plan="{}", cast_sha256="0" * 64)
REPORT = Report(
    run="r", round=5, rows=20, train_rows=10, metrics={"auroc": 0.5}, summand_sha256="1" * 64, salt="2" * 64
)


class Killed(BaseException):
    """The process was killed here."""


def killed_at(line, work, *modules):
    """Run ``work`` until it has executed ``line`` lines of ``modules``; no handler of theirs runs after that."""
    files, left = {module.__file__ for module in modules}, line

    def trace(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                raise Killed
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
        return False
    except Killed:
        return True
    finally:
        sys.settrace(before)


@pytest.fixture
def box(tmp_path):
    folder = tmp_path / "state" / "inbox"
    folder.mkdir(parents=True)
    return folder


def arrived(tmp_path, data=b"cast"):
    path = tmp_path / "state" / ".incoming"
    path.write_bytes(data)
    return path


def place(tmp_path, box, envelope=ENVELOPE, head='{"a": 1}', data=b"cast"):
    inbox.place(box, envelope, head, arrived(tmp_path, data))


def drafted(outbox, data=b"payload"):
    draft = outbox / f".{inbox.key_of(VISIT)}"
    draft.mkdir(exist_ok=True)
    (draft / "payload").write_bytes(data)
    return draft


# --- the inbox ---


def test_a_message_lies_whole_until_it_is_dropped(tmp_path, box):
    place(tmp_path, box)
    (entry,) = inbox.waiting(box)
    assert entry.envelope == ENVELOPE and entry.head() == '{"a": 1}' and entry.payload.read_bytes() == b"cast"
    assert not arrived(tmp_path).with_name(".incoming-").exists() and len(list(box.iterdir())) == 1
    assert stat.S_IMODE(entry.folder.stat().st_mode) == 0o700
    inbox.drop(entry)
    assert list(inbox.waiting(box)) == [] == list(box.iterdir())
    inbox.drop(entry)  # again, after a crash


def test_the_same_message_again_changes_nothing_and_leaves_nothing(tmp_path, box):
    place(tmp_path, box)
    place(tmp_path, box, ENVELOPE._replace(received_at=9e9), head="other", data=b"other")
    (entry,) = inbox.waiting(box)
    assert entry.envelope == ENVELOPE and entry.head() == '{"a": 1}' and entry.payload.read_bytes() == b"cast"
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["inbox"] and list(box.iterdir()) == [entry.folder]


def test_messages_are_worked_on_oldest_first(tmp_path, box):
    times = [1e9 + 0.5, 5.0, 1e9, 999.0, 2e9]
    for n, created in enumerate(times):
        place(tmp_path, box, ENVELOPE._replace(created_at=created, message_id=f"{n:064x}"))
    assert [e.envelope.created_at for e in inbox.waiting(box)] == sorted(times)
    place(tmp_path, box, ENVELOPE._replace(created_at=5.0, message_id="f" * 64))  # another one of the same time
    assert len(list(inbox.waiting(box))) == 6


@pytest.mark.parametrize("looked", [True, False])
def test_a_kill_between_any_two_steps_leaves_all_of_a_message_or_none(tmp_path, box, looked):
    """The next start clears drafts; then it may look at the inbox first, or receive the message again first."""
    seen = set()
    for line in itertools.count():
        payload = arrived(tmp_path)
        killed = killed_at(line, lambda payload=payload: inbox.place(box, ENVELOPE, "{}", payload), inbox, store)
        inbox.clear_drafts(box)
        if looked:
            entries = list(inbox.waiting(box))
            seen.add(len(entries))
            assert len(entries) == len(list(box.iterdir()))
            assert all((e.head(), e.payload.read_bytes(), e.envelope) == ("{}", b"cast", ENVELOPE) for e in entries)
        if not killed:
            break
        place(tmp_path, box, head="{}")  # it was not confirmed, so it comes again
        (entry,) = inbox.waiting(box)
        assert (entry.head(), entry.payload.read_bytes(), entry.envelope) == ("{}", b"cast", ENVELOPE)
        inbox.drop(entry)
    assert seen == ({0, 1} if looked else set()) and line > 40


def test_everything_is_on_the_disk_before_the_message_appears(tmp_path, box, monkeypatch):
    done, sync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name), sync(handle)))  # fmt: skip
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append("it appears"), rename(a, b)))
    place(tmp_path, box)
    (entry,) = inbox.waiting(box)
    assert [name for name in done if "json" in name] == [".head.json.draft", ".envelope.json.draft"]
    assert done[-3:] == [f".{entry.folder.name}", "it appears", "inbox"]


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"flower_run": 1}', "7"])
def test_a_damaged_message_is_cleared_and_the_others_stay(tmp_path, box, text):
    place(tmp_path, box)
    place(tmp_path, box, ENVELOPE._replace(message_id="cd" * 32))
    bad, good = sorted(box.iterdir())
    (bad / "envelope.json").unlink()
    if text is not None:
        (bad / "envelope.json").write_text(text)
    (box / ".draft").mkdir()
    (box / "note.txt").write_text("a person's own file")
    assert [e.folder for e in inbox.waiting(box)] == [good]
    assert sorted(p.name for p in box.iterdir()) == [".draft", good.name, "note.txt"]
    inbox.clear_drafts(box)
    assert sorted(p.name for p in box.iterdir()) == [good.name, "note.txt"]


@pytest.mark.parametrize("message_id", ["x/../../../evil", "/../../evil", "../evil", "a/b", "\0", ".", "", "é" * 200])
def test_a_message_id_cannot_lead_out_of_the_inbox(tmp_path, box, message_id):
    before = {p for p in tmp_path.rglob("*") if "inbox" not in p.parts}
    place(tmp_path, box, ENVELOPE._replace(message_id=message_id[:1]))
    place(tmp_path, box, ENVELOPE._replace(message_id=message_id))
    assert {p for p in tmp_path.rglob("*") if "inbox" not in p.parts} == before
    assert message_id in {e.envelope.message_id for e in inbox.waiting(box)}
    assert all(p.parent == box for p in box.iterdir()) and len(list(box.iterdir())) in (1, 2)


# --- the outbox ---


def test_a_key_changes_with_everything_that_is_asked():
    other = {"run": "s", "round": 6, "train": False, "evaluate": False, "baseline": True, "plan": "[]", "cast_sha256": "1" * 64}  # fmt: skip
    shown = {
        "proposal",
        "seal",
        "before",
        "witnesses",
        "receipt",
        "receipt_seal",
        "head",
    }  # what allows it, not what it is
    assert set(other) | shown | {"protocol"} == set(Visit.model_fields)
    keys = {inbox.key_of(VISIT.model_copy(update={field: value})) for field, value in other.items()}
    assert len(keys | {inbox.key_of(VISIT)}) == len(other) + 1
    assert inbox.key_of(VISIT.model_copy()) == inbox.key_of(VISIT)
    assert {inbox.key_of(VISIT.model_copy(update={field: "x"})) for field in shown} == {inbox.key_of(VISIT)}


def test_an_answer_is_found_for_its_visit_only(tmp_path):
    assert inbox.stored(tmp_path, VISIT) is None
    inbox.commit(tmp_path, drafted(tmp_path), VISIT, REPORT, 3, LISTED)
    assert inbox.stored(tmp_path, VISIT) == (REPORT, b"payload", 3, LISTED)
    assert inbox.stored(tmp_path, VISIT.model_copy(update={"round": 6})) is None
    assert len(list(tmp_path.iterdir())) == 1


def test_a_second_answer_to_a_visit_does_not_replace_the_first(tmp_path):
    inbox.commit(tmp_path, drafted(tmp_path), VISIT, REPORT, 3, LISTED)
    inbox.commit(tmp_path, drafted(tmp_path, b"other"), VISIT, REPORT, 4, LISTED)
    assert inbox.stored(tmp_path, VISIT) == (REPORT, b"payload", 3, LISTED)
    inbox.clear_drafts(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_kill_between_any_two_steps_leaves_all_of_an_answer_or_none(tmp_path):
    seen = set()
    for line in itertools.count():
        work = drafted(tmp_path)
        killed = killed_at(line, lambda work=work: inbox.commit(tmp_path, work, VISIT, REPORT, 3, LISTED), inbox, store)
        inbox.clear_drafts(tmp_path)
        found = inbox.stored(tmp_path, VISIT)
        seen.add(found is None)
        assert found in (None, (REPORT, b"payload", 3, LISTED))
        if not killed:
            break
        for folder in tmp_path.iterdir():
            os.rename(folder, tmp_path.parent / f"{tmp_path.name}-{line}")
    assert seen == {True, False} and line > 40


def test_answers_of_the_last_round_are_kept_and_those_before_forgotten(tmp_path):
    for run, round in itertools.product(("r", "s"), range(3, 7)):
        visit = VISIT.model_copy(update={"run": run, "round": round})
        inbox.commit(tmp_path, drafted(tmp_path), visit, REPORT, None, LISTED)
    (tmp_path / "note.txt").write_text("")
    inbox.tidy(tmp_path, VISIT)  # round 5 of run r
    kept = {
        (run, round)
        for run, round in itertools.product(("r", "s"), range(3, 7))
        if inbox.stored(tmp_path, VISIT.model_copy(update={"run": run, "round": round}))
    }
    assert kept == {("r", 4), ("r", 5), ("r", 6), ("s", 3), ("s", 4), ("s", 5), ("s", 6)}
    assert (tmp_path / "note.txt").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"run": "r"}'])
def test_a_damaged_answer_is_not_sent_and_its_work_is_done_anew(tmp_path, text):
    folder = inbox.commit(tmp_path, drafted(tmp_path), VISIT, REPORT, 1, LISTED)
    (folder / "visit.json").write_text(text)
    assert inbox.stored(tmp_path, VISIT) is None and not folder.exists()


def test_what_is_a_month_old_is_forgotten(tmp_path):
    for name, days in (("old", 31), ("new", 29)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1, time.time() - days * 86400))
    inbox.forget_old(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["new"]
