"""The ledger's signatures: every event has one, an older file gets one that vouches for it, and a wrong one is named."""

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedtailor.client import journal
from fedtailor.client.ledger import Cap, Charge, Ledger
from fedtailor.client.signing import Signer
from fedtailor.client.statement import sentences, statement
from fedtailor.client.verify_audit import BARE, Wrong, follow, hash_of
from fedtailor.errors import StoreError
from fedtailor.policy import Policy


def signer(number, *former):
    return Signer(ec.derive_private_key(number, ec.SECP384R1()), tuple(one.key for one in former))


SIGNER, OTHER = signer(20260101), signer(7)
WORK = {"account": "heart", "fingerprint": "f0", "study": "s", "charge": Charge(1.0, 0.032, 20), "cap": Cap(3.0, 1e-5)}
FIRST_SCHEMA = """
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, time TEXT NOT NULL,
    account TEXT, fingerprint TEXT, study TEXT, visit TEXT, noise_multiplier REAL, rate REAL, steps INTEGER,
    reservation INTEGER, digest TEXT NOT NULL, hash TEXT NOT NULL);
CREATE TABLE keys (reservation INTEGER PRIMARY KEY, key BLOB NOT NULL);
PRAGMA journal_mode = WAL;
PRAGMA user_version = 1;
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.db"


@pytest.fixture
def ledger(path):
    it = Ledger(path, SIGNER)
    one = it.reserve(visit="v0", **WORK)
    it.settle(one.id, "d" * 64)
    it.reserve(visit="v1", **WORK)
    yield it
    it.close()


@pytest.fixture
def first(path):
    """A file as the first fedtailor wrote it: one round settled, one open. Its head."""
    key, time = bytes(range(32)), "2026-01-01T00:00:00+00:00"
    commitment = hashlib.sha256(b"fedtailor/ledger/key/1" + key).hexdigest()
    what = ["heart", "f0", "s"]
    rows = [
        [1, "reserve", time, *what, "v0", 1.0, 0.032, 20, None, "c" * 64],
        [2, "settle", time, *[None] * 7, 1, "d" * 64],
        [3, "reserve", time, *what, "v1", 1.0, 0.032, 20, None, commitment],
    ]
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executescript(FIRST_SCHEMA)
        last = ""
        for row in rows:
            last = hashlib.sha256(json.dumps([last, *row], separators=(",", ":")).encode()).hexdigest()
            db.execute(f"INSERT INTO events VALUES ({', '.join('?' * 13)})", [*row, last])
        db.execute("INSERT INTO keys VALUES (3, ?)", (key,))
    return 3, last


def tampered(path, *statements):
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)


def test_every_event_is_signed(ledger, path):
    entries = ledger.export()
    assert [e["record"]["fields"]["kind"] for e in entries] == ["key", "reserve", "settle", "reserve"]
    head = follow("ledger", entries)
    assert (head.number, head.hash) == ledger.head() and (head.key, head.unsigned, head.breaks) == (
        SIGNER.public,
        0,
        (),
    )
    assert entries == journal.read(path) and "key" not in entries[1]["record"]
    assert all(bytes(32).hex() not in json.dumps(e) and "keys" not in json.dumps(e) for e in entries)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_signature_that_is_wrong_is_named(ledger, path, number):
    ledger.close()
    entries = journal.read(path)
    taken = entries[number % 4]["signature"]  # of another record
    tampered(path, f"UPDATE events SET signature = '{taken}' WHERE id = {number}")
    with pytest.raises(StoreError, match=f"record {number} was changed.*never delete"):
        Ledger(path, SIGNER)


def test_a_forger_without_the_key_is_named_though_every_hash_fits(ledger, path):
    ledger.close()
    entries, before = journal.read(path), ""
    entries[1]["record"]["fields"]["steps"] = 1
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE events SET steps = 1 WHERE id = 2")
        for entry in entries:
            entry["record"]["before"] = before
            before = entry["hash"] = hash_of(entry)
            db.execute("UPDATE events SET hash = ? WHERE id = ?", (before, entry["record"]["number"]))
    with pytest.raises(StoreError, match="record 4 has a signature that is not the site's"):
        Ledger(path, SIGNER)


def test_a_forged_event_is_named_while_the_ledger_is_in_use(ledger, path):
    head = follow("ledger", ledger.export())
    fields = {"kind": "settle", **dict.fromkeys(("account", "fingerprint", "study", "visit", "noise_multiplier", "rate", "steps")),
              "reservation": 4, "digest": "x"}  # fmt: skip
    forged = OTHER.entry("ledger", head._replace(key=OTHER.public), "2026-01-01", fields)
    tampered(path, "INSERT INTO events VALUES (5, 'settle', '2026-01-01', NULL, NULL, NULL, NULL, NULL, NULL, NULL, 4, 'x', "
                   f"'{forged['hash']}', '{forged['signature']}')")  # fmt: skip
    with pytest.raises(StoreError, match="record 5 has a signature that is not the site's"):
        ledger.statement()


def test_a_signature_that_was_stripped_is_named(ledger, path):
    ledger.close()
    tampered(path, "UPDATE events SET signature = NULL WHERE id = 4")
    with pytest.raises(StoreError, match="record 4"):
        Ledger(path, SIGNER)


def test_an_unsigned_event_does_not_pass_though_its_hash_fits(ledger, path):
    number, before = ledger.head()
    fields = {"kind": "settle", **dict.fromkeys(BARE), "reservation": 4, "digest": "x"}
    entry = {"record": {"number": number + 1, "time": "t", "before": before, "fields": fields}, "signature": None}
    tampered(path, "INSERT INTO events (kind, time, reservation, digest, hash) "
                   f"VALUES ('settle', 't', 4, 'x', '{hash_of(entry)}')")  # fmt: skip
    with pytest.raises(StoreError, match="record 5 is not signed"):
        ledger.statement()
    entry["record"] |= {"number": 1, "before": ""}
    with pytest.raises(Wrong, match="record 1 is not signed"):  # and in no other log
        follow("egress", [entry | {"hash": hash_of(entry)}])
    assert follow("ledger", [entry | {"hash": hash_of(entry)}]).unsigned == 1


def test_nothing_unsigned_is_added_to_a_signed_file(ledger, path):
    reader = Ledger(path)
    assert reader.export() == ledger.export()
    with pytest.raises(StoreError, match="signed by another key"):
        reader.reserve(visit="v2", **WORK)
    reader.close()
    newer = Ledger(path, signer(7, SIGNER))
    with pytest.raises(StoreError, match="signed by another key"):
        ledger.reserve(visit="v2", **WORK)  # the daemon that still has the old one
    newer.close()


def test_a_new_key_is_vouched_for_or_told(ledger, path, caplog):
    ledger.sign_with(signer(7, SIGNER))
    assert ledger.reserve(visit="v2", **WORK).id == 6 and not caplog.records
    assert follow("ledger", ledger.export()).breaks == ()
    alone = Ledger(path, signer(8))
    assert follow("ledger", alone.export()).breaks == (7,) and "not there to vouch" in caplog.text
    assert len(alone.charges("heart", "f0")) == 3, "and nothing is forgotten"
    alone.close()


# --- a file of version 1 ---


def test_an_older_file_is_vouched_for_and_says_so(first, path):
    ledger = Ledger(path, SIGNER)
    assert ledger.contains(first) and ledger.head()[0] == 4
    open_one = ledger.reserve(visit="v1", **WORK)
    assert (open_one.id, open_one.key) == (3, bytes(range(32))), "work goes on, with the key that it had"
    ledger.settle(3, "e" * 64)
    entries = ledger.export()
    head = follow("ledger", entries)
    assert (head.number, head.unsigned, head.breaks) == (5, 3, ()) and entries[3]["record"]["before"] == first[1]
    assert [entry["signature"] is None for entry in entries] == [True, True, True, False, False]
    ledger.close()
    again = Ledger(path, SIGNER)
    assert again.head() == (head.number, head.hash)
    again.close()
    assert sqlite3.connect(path).execute("PRAGMA user_version").fetchone() == (2,), "an older fedtailor refuses it"


def test_an_older_file_can_be_read_without_being_converted(first, path):
    head = follow("ledger", journal.read(path))
    assert (head.number, head.hash, head.unsigned) == (*first, 3)
    assert sqlite3.connect(path).execute("PRAGMA user_version").fetchone() == (1,)


@pytest.mark.parametrize("tamper", ["UPDATE events SET steps = 1 WHERE id = 1", "DELETE FROM events WHERE id = 2",
                                    "DELETE FROM events WHERE id = 3", "DELETE FROM keys"])  # fmt: skip
def test_an_older_file_that_was_edited_is_not_vouched_for(first, path, tamper):
    tampered(path, tamper)
    for _ in range(2):
        with pytest.raises(StoreError, match="record [123]"):
            Ledger(path, SIGNER)
    assert sqlite3.connect(path).execute("PRAGMA user_version").fetchone() == (1,)


@pytest.mark.parametrize("statement", ["ALTER TABLE", "INSERT INTO events"])
def test_kill_9_in_the_middle_of_the_conversion_leaves_the_older_file(first, path, statement):
    code = """
import os, signal, sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric import ec
from fedtailor.client.journal import Journal
from fedtailor.client.signing import Signer
def die(text):
    if text.startswith(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
real = Journal._convert
Journal._convert = lambda self: (self.db.set_trace_callback(die), real(self))
Journal(Path(sys.argv[1]), Signer(ec.derive_private_key(20260101, ec.SECP384R1())))
"""
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code, str(path), statement], env=env, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert journal.read(path)[-1]["hash"] == first[1]
    ledger = Ledger(path, SIGNER)
    assert ledger.contains(first) and ledger.head()[0] == 4 and len(ledger.charges("heart", "f0")) == 2
    ledger.close()


def test_a_newer_file_is_refused(ledger, path):
    ledger.close()
    tampered(path, "PRAGMA user_version = 3")
    for call in (lambda: Ledger(path, SIGNER), lambda: journal.read(path)):
        with pytest.raises(StoreError, match="newer fedtailor .version 3."):
            call()


def test_a_killed_daemons_file_can_be_read(ledger, path):
    """Its last events are still in the write-ahead log."""
    copy = path.parent / "copy"
    copy.mkdir()
    for name in ("ledger.db", "ledger.db-wal"):  # as after a power cut: without the shared index
        (copy / name).write_bytes((path.parent / name).read_bytes())
    assert journal.read(copy / "ledger.db") == ledger.export()
    assert journal.read(path.parent / "nowhere.db") == []


# --- in plain words ---


def test_the_statement_adds_up_by_data_set_and_run(ledger):
    ledger.reserve(visit="w", **WORK | {"study": "t", "account": "renamed"})
    ledger.reserve(visit="w", **WORK | {"study": "u", "account": "lungs", "fingerprint": "f9"})
    policy = Policy(studies=("x",), epsilon=3.0, delta=1e-5)
    stated = statement(ledger, "heart", "f0", policy)
    heart, lungs, renamed = stated["accounts"]
    assert (
        heart["runs"] == [{"run": "s", "settled": 1, "open": 1}] and heart["spent"] == renamed["spent"] > lungs["spent"]
    )
    assert heart["left"] == 3.0 - heart["spent"] and (lungs["cap"], lungs["left"]) == (None, None)
    assert heart["spent"] == ledger.spent(account="heart", fingerprint="f0", delta=1e-5) and len(stated["rows"]) == 4
    text = sentences(stated)
    assert f"heart: epsilon {heart['spent']:.3f} spent of 3; {heart['left']:.3f} left (delta 1e-05)" in text
    assert "  s: 1 rounds settled, 1 open" in text
    number, hash = ledger.head()
    assert f"head: ledger:{number}:{hash}" in text
    new = statement(ledger, "new", "f0", policy)["accounts"][2]
    assert (new["data"], new["spent"], new["runs"]) == ("new", heart["spent"], []), "a new name resets nothing"
