"""The ledger: never under-counts, through crashes, races, edits and renaming."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fedtailor.client.ledger import Cap, Charge, Ledger
from fedtailor.errors import RefusedError, StoreError
from fedtailor.privacy.accounting import affordable, epsilon

CHARGE, CAP = Charge(1.0, 0.032, 20), Cap(3.0, 1e-5)  # ten of these fit
WORK = {"account": "heart", "fingerprint": "f0", "study": "s", "charge": CHARGE, "cap": CAP}
PROCESS = """
import sys, time
from pathlib import Path
from fedtailor.client.ledger import Cap, Charge, Ledger
from fedtailor.errors import RefusedError
path, name, wait = sys.argv[1:]
ledger = Ledger(Path(path))
print("ready", flush=True)
sys.stdin.readline()
try:
    for i in range(100):
        r = ledger.reserve(account="heart", fingerprint="f0", study="s", visit=f"{name}/{i}",
                           charge=Charge(1.0, 0.032, 20), cap=Cap(3.0, 1e-5))
        print(r.id, r.key.hex(), flush=True)
        if wait == "wait":
            time.sleep(60)
except RefusedError:
    pass
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "ledger.sqlite"


@pytest.fixture
def ledger(path):
    it = Ledger(path)
    yield it
    it.close()


def spent(ledger, account="heart", fingerprint="f0"):
    return ledger.spent(account=account, fingerprint=fingerprint, delta=CAP.delta)


def start(path, name, wait="go"):
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen([sys.executable, "-c", PROCESS, str(path), name, wait], env=env, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip


def test_a_repeated_visit_is_one_charge_with_one_key(ledger, path):
    first = ledger.reserve(visit="v", **WORK)
    assert len(first.key) == 32 and first.key.hex() not in repr(first) and repr(first.key) not in repr(first)
    assert ledger.reserve(visit="v", **WORK) == first
    other = Ledger(path)  # another process, or the next start
    assert other.reserve(visit="v", **WORK) == first
    other.close()
    assert ledger.charges("heart", "f0") == [CHARGE]
    assert ledger.reserve(visit="w", **WORK).key != first.key


def test_settling_erases_the_key_and_is_final(ledger, path):
    first = ledger.reserve(visit="v", **WORK)
    files = [path, path.with_name(path.name + "-wal")]
    assert any(first.key in f.read_bytes() for f in files)
    ledger.settle(first.id, "d1")
    ledger.settle(first.id, "d1")
    assert not any(first.key in f.read_bytes() for f in files)
    replay = ledger.reserve(visit="v", **WORK)
    assert (replay.id, replay.key, replay.settled_digest) == (first.id, None, "d1")
    for id, digest in ((first.id, "d2"), (99, "d1")):
        with pytest.raises(RefusedError) as refusal:
            ledger.settle(id, digest)
        assert refusal.value.code == "settled"
    again = ledger.reserve(visit="v", again=True, **WORK)
    assert again.id != first.id and again.key != first.key and len(ledger.charges("heart", "f0")) == 2
    assert ledger.reserve(visit="v", again=True, **WORK) == again  # a crash here does not charge a third time


def test_the_same_visit_on_other_data_or_at_another_price_is_a_new_charge(ledger):
    one = ledger.reserve(visit="v", **WORK)
    two = ledger.reserve(visit="v", **WORK | {"fingerprint": "f1"})
    three = ledger.reserve(visit="v", **WORK | {"charge": Charge(2, 0.032, 20)})
    assert len({r.id for r in (one, two, three)}) == len({r.key for r in (one, two, three)}) == 3
    assert spent(ledger) == epsilon([CHARGE, CHARGE, Charge(2.0, 0.032, 20)], CAP.delta)
    assert ledger.head()[0] == 3  # and the whole-number multiplier did not break the chain


def test_it_refuses_before_work_and_says_what_is_left(ledger):
    for i in range(10):
        ledger.reserve(visit=f"v{i}", **WORK)
    with pytest.raises(
        RefusedError, match=r"spent epsilon 2\.998 of 3 .* bring it to 3\.1\d+; 0 such rounds"
    ) as refusal:
        ledger.reserve(visit="v10", **WORK)
    assert refusal.value.code == "budget" and len(ledger.statement()) == 10
    small = Charge(4.0, 0.001, 1)
    assert ledger.affordable(account="heart", fingerprint="f0", charge=small, cap=CAP) > 0
    assert ledger.reserve(visit="small", **WORK | {"charge": small}).key
    assert ledger.reserve(visit="v3", **WORK).id == 4  # what was charged may still be finished


def test_a_study_never_spends_more_than_its_plan_promises(ledger):
    """Also where the site's own cap would allow more: a coordinator could ask one round again and again."""
    promise = epsilon([CHARGE] * 2, CAP.delta)
    for i in range(2):
        ledger.reserve(visit=f"v{i}", promise=promise, **WORK)
    assert ledger.reserve(visit="v1", promise=promise, **WORK).key, "what was granted is granted"
    with pytest.raises(RefusedError, match="promises at most") as refused:
        ledger.reserve(visit="v2", promise=promise, **WORK)
    assert refused.value.code == "promise" and len(ledger.statement()) == 2
    ledger.reserve(visit="v2", promise=promise, **WORK | {"study": "another"})
    assert len(ledger.charges("heart", "f0", without="s")) == 1 and len(ledger.charges("heart", "f0")) == 3


def test_renaming_or_changing_the_data_never_resets_the_budget(ledger):
    ledger.reserve(visit="1", **WORK)
    ledger.reserve(visit="2", **WORK | {"account": "renamed"})  # the same rows
    ledger.reserve(visit="3", **WORK | {"account": "renamed", "fingerprint": "f1"})  # and then one row more
    assert len(ledger.charges("heart", "new")) == len(ledger.charges("renamed", "new")) == 3
    assert len(ledger.charges("new", "f1")) == 3 and ledger.charges("new", "new") == []
    assert ledger.affordable(account="new", fingerprint="f0", charge=CHARGE, cap=CAP) == 7


def test_the_statement_is_for_people(ledger):
    first = ledger.reserve(visit="v", **WORK)
    ledger.reserve(visit="w", **WORK)
    ledger.settle(first.id, "d")
    a, b = ledger.statement()
    assert (a.account, a.study, a.visit, a.charge, a.settled_digest) == ("heart", "s", "v", CHARGE, "d")
    assert b.settled_digest is None and a.time.endswith("+00:00")


def test_the_files_are_the_owners_alone(ledger, path):
    ledger.reserve(visit="v", **WORK)
    assert {stat.S_IMODE(f.stat().st_mode) for f in path.parent.iterdir()} == {0o600}


def test_a_killed_process_leaves_its_charge_and_its_key(path):
    process = start(path, "a", "wait")
    print(file=process.stdin, flush=True)
    assert process.stdout.readline() == "ready\n"
    id, key = process.stdout.readline().split()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    ledger = Ledger(path)
    assert spent(ledger) == epsilon([CHARGE], CAP.delta)
    replay = ledger.reserve(visit="a/0", **WORK)
    assert (replay.id, replay.key.hex()) == (int(id), key) and len(ledger.statement()) == 1
    ledger.close()


def test_two_processes_cannot_overspend(path):
    racers = [start(path, name) for name in "ab"]  # they also race to create the file
    assert [r.stdout.readline() for r in racers] == ["ready\n"] * 2
    for r in racers:
        print(file=r.stdin, flush=True)
    lines = "".join(r.communicate(timeout=60)[0] for r in racers).splitlines()
    assert len(lines) == len(set(lines)) == affordable([], CHARGE, CAP.epsilon, CAP.delta) == 10
    ledger = Ledger(path)
    assert spent(ledger) <= CAP.epsilon and len(ledger.statement()) == 10
    ledger.close()


def test_an_edited_byte_is_refused_or_changes_nothing(tmp_path, path):
    ledger = Ledger(path)
    ids = [ledger.reserve(visit=f"v{i}", **WORK).id for i in range(3)]
    ledger.settle(ids[0], "d")
    truth = ledger.statement()
    keys = [ledger.reserve(visit=f"v{i}", **WORK).key for i in (1, 2)]
    ledger.close()
    whole, edited = path.read_bytes(), tmp_path / "edited.sqlite"
    text = [whole.index(word) for word in (b"heart", b"v1", b"reserve", b"settle", truth[0].time.encode(), keys[0])]
    refused = 0
    for at in [*text, *range(0, len(whole), 41)]:
        edited.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            other = Ledger(edited)
            try:
                assert other.statement() == truth
                assert [other.reserve(visit=f"v{i}", **WORK).key for i in (1, 2)] == keys
            finally:
                other.close()
        except StoreError as error:
            assert str(edited) in str(error)
            refused += 1
            assert at not in text or "record" in str(error)
        else:
            assert at not in text
        for side in ("-wal", "-shm"):
            edited.with_name(edited.name + side).unlink(missing_ok=True)
    assert refused > len(text)


@pytest.mark.parametrize("tamper,text", [("DELETE FROM events WHERE id = 2", "record 2 is missing"),
                                         ("DELETE FROM events WHERE id = 3", "record 3 is missing"),
                                         ("DELETE FROM keys WHERE reservation = 3", "key of record 3"),
                                         ("UPDATE events SET steps = 1 WHERE id = 1", "record 1")])  # fmt: skip
def test_missing_and_changed_records_are_named(ledger, path, tamper, text):
    for i in range(3):
        ledger.reserve(visit=f"v{i}", **WORK)
    head = ledger.head()
    ledger._journal.db.execute(tamper)
    with pytest.raises(StoreError, match=text) as error:
        Ledger(path)
    assert "restore" in str(error.value)
    assert head[0] == 3


def test_an_older_copy_shows_in_its_head(tmp_path, ledger):
    ledger.reserve(visit="v0", **WORK)
    earlier = ledger.head()
    ledger.reserve(visit="v1", **WORK)
    assert ledger.contains(earlier) and ledger.contains((0, "")) and not ledger.contains((2, earlier[1]))
    older = Ledger(tmp_path / "older.sqlite")
    older.reserve(visit="v0", **WORK)
    assert not older.contains(ledger.head()) and not older.contains(earlier)
    older.close()


def test_a_file_that_is_no_ledger_is_left_alone(tmp_path):
    wrong = tmp_path / "notes.txt"
    wrong.write_text("not a database " * 100)
    with pytest.raises(StoreError, match="notes.txt.*never delete"):
        Ledger(wrong)
    assert wrong.read_text() == "not a database " * 100
    with pytest.raises(StoreError, match="own the file"):
        Ledger(tmp_path)


def test_a_full_disk_writes_nothing(ledger, path):
    ledger.reserve(visit="v", **WORK)
    pages = ledger._journal.db.execute("PRAGMA page_count").fetchone()[0]
    ledger._journal.db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match="full.*make room"):
        for i in range(100):
            ledger.reserve(visit=f"{i}" * 2000, **WORK | {"charge": Charge(50.0, 0.001, 1)})
    count = len(ledger.statement())
    other = Ledger(path)
    assert len(other.statement()) == count and other.head() == ledger.head()
    other.close()
