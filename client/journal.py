"""The file under the privacy ledger: an append-only, hash-chained table of events, and the keys of open work."""

import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedtailor.errors import StoreError

_COLUMNS = "id, kind, time, account, fingerprint, study, visit, noise_multiplier, rate, steps, reservation, digest"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, time TEXT NOT NULL,
    account TEXT, fingerprint TEXT, study TEXT, visit TEXT, noise_multiplier REAL, rate REAL, steps INTEGER,
    reservation INTEGER, digest TEXT NOT NULL, hash TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS keys (reservation INTEGER PRIMARY KEY, key BLOB NOT NULL);
PRAGMA user_version = 1;
"""  # no index: one more copy of the data, which the chain would not cover
_WAY_OUT = (
    "Stop the daemon and restore the newest copy of this file that opens; never delete it, because the site would "
    "forget what it has spent and could exceed its privacy budget"
)
_BUSY_S = 30.0


class Journal:
    """An SQLite file: mode 0600, write-ahead log, every commit on disk before it returns.

    An event is of kind ``reserve`` (then ``digest`` commits to its key) or ``settle`` (then it is the output's hash).
    Each event's hash covers the one before. An edit, a gap or a cut-off tail shows; a whole older copy of the file does
    not: compare :attr:`head` with a note kept elsewhere.

    Raises:
        StoreError: from any method, if the file is damaged, cannot be written or stays locked; nothing is half-written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.RLock()
        self.head: tuple[int, str] = (0, "")  # the number of events, and the hash of the last
        with self._reading():
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            os.chmod(path, 0o600)  # SQLite gives its side files the same mode
            self.db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            with self._reading():
                self._prepare()
            with self.transaction():
                pass
        except BaseException:
            self.db.close()
            raise

    def _prepare(self) -> None:
        self.db.execute("PRAGMA secure_delete = ON")
        self.db.execute("PRAGMA synchronous = FULL")
        self.db.execute("PRAGMA journal_mode = WAL")
        version = self.db.execute("PRAGMA user_version").fetchone()[0]
        if version > 1:
            raise StoreError(f"ledger: {self.path} was written by a newer fedtailor (version {version}); install that")
        if version == 0:
            self.db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
            folder = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(folder)  # or the new file's name could be lost with the power
            os.close(folder)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self.db.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Alone with the file, verified: commit at the end, or leave it as it was."""
        with self._reading():
            self.db.execute("BEGIN IMMEDIATE")
            try:
                self.head = self._verify()
                yield self.db
                self.db.execute("COMMIT")
            except BaseException:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
                raise

    def append(self, kind: str, *values: Any, key: bytes | None = None) -> int:
        """Add one event, at most one in a transaction; ``values`` are the columns from account to digest.

        With ``key``, the key is stored beside the event, whose digest commits to it.
        """
        id, last = self.head[0] + 1, self.head[1]
        row = (id, kind, datetime.now(UTC).isoformat(timespec="seconds"), *values)
        if key is not None:
            row = (*row, _commitment(key))
            self.db.execute("INSERT INTO keys VALUES (?, ?)", (id, key))
        self.db.execute(f"INSERT INTO events ({_COLUMNS}, hash) VALUES ({'?, ' * 12}?)", (*row, _chain(last, row)))
        return id

    def erase(self) -> None:
        """Empty the write-ahead log, which still holds the pages of deleted keys."""
        with self._reading():
            self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _verify(self) -> tuple[int, str]:
        """Follow the chain from the last event that was seen, and check every stored key."""
        id, last = self.head
        if id and self.db.execute("SELECT hash FROM events WHERE id = ?", (id,)).fetchone() != (last,):
            raise StoreError(f"ledger: {self.path}: record {id} changed since it was read. {_WAY_OUT}")
        for row in self.db.execute(f"SELECT {_COLUMNS}, hash FROM events WHERE id > ? ORDER BY id", (id,)):
            if row[0] != id + 1 or row[-1] != _chain(last, row[:-1]):
                raise StoreError(f"ledger: {self.path}: record {id + 1} is damaged, or was edited. {_WAY_OUT}")
            id, last = row[0], row[-1]
        sequence = self.db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'events'").fetchone()
        if (sequence or (0,))[0] != id:
            raise StoreError(f"ledger: {self.path}: record {id + 1} is missing. {_WAY_OUT}")
        keys = dict(self.db.execute("SELECT reservation, key FROM keys").fetchall())
        for number, digest in self.db.execute(
            "SELECT id, digest FROM events WHERE kind = 'reserve'"
            " AND id NOT IN (SELECT reservation FROM events WHERE kind = 'settle')"
        ):
            if _commitment(keys.get(number)) != digest:
                raise StoreError(f"ledger: {self.path}: the key of record {number} is damaged. {_WAY_OUT}")
        return id, last

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"ledger: {self.path}: {error}. {_advice(error)}") from error


def _chain(previous: str, row: tuple[Any, ...]) -> str:
    text = json.dumps([previous, *row], separators=(",", ":"), default=repr)  # repr: a cell edited into a blob
    return hashlib.sha256(text.encode()).hexdigest()


def _commitment(key: Any) -> str:
    return hashlib.sha256(b"fedtailor/ledger/key/1" + (key if isinstance(key, bytes) else b"")).hexdigest()


def _advice(error: Exception) -> str:
    text = str(error).lower()
    if "locked" in text or "busy" in text:
        return "Another process holds it; stop the other daemon, or try again"
    if "full" in text or "space" in text:
        return "Nothing was written; make room on the disk and start again"
    if any(word in text for word in ("permission", "readonly", "read-only", "unable to open", "directory")):
        return "Let the daemon's user own the file and its folder"
    return _WAY_OUT
