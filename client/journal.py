"""The file under the privacy ledger: an append-only, hash-chained, signed table of events, and the keys of open work."""

import hashlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedtailor import store
from fedtailor.client.signing import Signer
from fedtailor.client.verify_audit import BARE, Entry, Head, Wrong, follow, hash_of
from fedtailor.errors import StoreError

VERSION = 2  # 1: without signatures
_COLUMNS = f"id, kind, time, {', '.join(BARE)}, hash"
_SCHEMA = (
    """CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, time TEXT NOT NULL,
    account TEXT, fingerprint TEXT, study TEXT, visit TEXT, noise_multiplier REAL, rate REAL, steps INTEGER,
    reservation INTEGER, digest TEXT NOT NULL, hash TEXT NOT NULL)""",
    "CREATE TABLE keys (reservation INTEGER PRIMARY KEY, key BLOB NOT NULL)",
)  # no index: one more copy of the data, which the chain would not cover
_WAY_OUT = (
    "Stop the daemon and restore the newest copy of this file that opens; never delete it, because the site would "
    "forget what it has spent and could exceed its privacy budget"
)
_BUSY_S = 30.0
_log = logging.getLogger("fedtailor.client")


class Journal:
    """An SQLite file: mode 0600, write-ahead log, every commit on disk before it returns.

    An event is of kind ``reserve`` (then ``digest`` commits to its key), ``settle`` (then it is the output's hash) or
    ``key`` (then it is the public key that signs from here on). The chain is that of verify_audit.py. An edit, a gap or
    a cut-off tail shows; a whole older copy of the file does not: compare :attr:`head` with a note kept elsewhere.

    Args:
        signer: signs each event. None, for tests and readers: a file that is signed cannot be added to then.

    Raises:
        StoreError: from any method, if the file is damaged, cannot be written or stays locked; nothing is half-written.
    """

    def __init__(self, path: Path, signer: Signer | None = None) -> None:
        self.path, self._lock, self._head = path, threading.RLock(), Head()
        self._signer: Signer | None = None
        with self._reading():
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            os.chmod(path, 0o600)  # SQLite gives its side files the same mode
            self.db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            with self._reading():
                self.db.execute("PRAGMA secure_delete = ON")
                self.db.execute("PRAGMA synchronous = FULL")
                self._write_ahead()
            with self.transaction(
                every=False
            ):  # a file of version 1 is verified, converted and signed, or left as it was
                self._sign_with(signer)
        except BaseException:
            self.db.close()
            raise

    def _write_ahead(self) -> None:
        end = time.monotonic() + _BUSY_S
        while True:
            try:
                self.db.execute("PRAGMA journal_mode = WAL")
                return
            except (
                sqlite3.OperationalError
            ) as error:  # it does not wait by itself for another process that does the same
                if "lock" not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(0.02)

    @property
    def head(self) -> tuple[int, str]:
        """The number of events, and the hash of the last."""
        return self._head.number, self._head.hash

    def sign_with(self, signer: Signer) -> None:
        """Sign with another key from now on; an event says so, signed by the old key if the signer has it."""
        with self.transaction():
            self._sign_with(signer)

    def _sign_with(self, signer: Signer | None) -> None:
        self._signer, known = signer, self._head
        if signer is None or known.key == signer.public:
            return
        if known.key not in ("", *signer.vouching):
            _log.warning("%s: the key changed, and the old one is not there to vouch for it", self.path)
        self.append("key", *[None] * (len(BARE) - 1), signer.public)
        if known.number and not known.key:
            _log.info("%s: its %d records were not signed; now the next one vouches for them", self.path, known.number)

    def _convert(self) -> None:
        """Bring the file to this version, inside a transaction."""
        version = _version(self.db, self.path)
        if version == 0:
            for statement in _SCHEMA:
                self.db.execute(statement)
            store.sync_name(self.path)  # or the new file's name could be lost with the power
        if version < VERSION:
            self.db.execute("ALTER TABLE events ADD COLUMN signature TEXT")
            self.db.execute(f"PRAGMA user_version = {VERSION}")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self.db.close()

    @contextmanager
    def transaction(self, *, every: bool = True) -> Iterator[sqlite3.Connection]:
        """Alone with the file, verified: commit at the end, or leave it as it was."""
        with self._reading():
            self.db.execute("BEGIN IMMEDIATE")
            try:
                self._convert()
                self._head = self._verify(every)
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
        id, moment = self._head.number + 1, datetime.now(UTC).isoformat(timespec="seconds")
        if key is not None:
            values = (*values, _commitment(key))
            self.db.execute("INSERT INTO keys VALUES (?, ?)", (id, key))
        entry = _entry((id, kind, moment, *values, "", None), self._head.hash)
        if self._signer is not None:
            entry = self._signer.entry("ledger", self._head, moment, entry["record"]["fields"])
        if self._head.key if self._signer is None else ("key" in entry["record"]) != (kind == "key"):
            raise StoreError(f"ledger: {self.path} is signed by another key than this daemon's; start the daemon again")
        row = (id, kind, moment, *values, hash_of(entry), entry["signature"])
        self.db.execute(f"INSERT INTO events ({_COLUMNS}, signature) VALUES ({', '.join('?' * len(row))})", row)
        return id

    def entries(self) -> list[Entry]:
        """Every event, as verify_audit.py reads it."""
        with self.transaction():
            return list(_entries(self.db, 0, ""))

    def erase(self) -> None:
        """Empty the write-ahead log, which still holds the pages of deleted keys."""
        with self._reading():
            self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _verify(self, every: bool) -> Head:
        """Follow the chain from the last event that was seen, and check every stored key."""
        id, last = self.head
        if id and self.db.execute("SELECT hash FROM events WHERE id = ?", (id,)).fetchone() != (last,):
            raise StoreError(f"ledger: {self.path}: record {id} changed since it was read. {_WAY_OUT}")
        try:
            head = follow("ledger", _entries(self.db, id, last), self._head, every=every)
        except Wrong as error:
            raise StoreError(f"ledger: {self.path}: {error}. {_WAY_OUT}") from error
        sequence = self.db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'events'").fetchone()
        if (sequence or (0,))[0] != head.number:
            raise StoreError(f"ledger: {self.path}: record {head.number + 1} is missing. {_WAY_OUT}")
        keys = dict(self.db.execute("SELECT reservation, key FROM keys").fetchall())
        for number, digest in self.db.execute(
            "SELECT id, digest FROM events WHERE kind = 'reserve'"
            " AND id NOT IN (SELECT reservation FROM events WHERE kind = 'settle')"
        ):
            if _commitment(keys.get(number)) != digest:
                raise StoreError(f"ledger: {self.path}: the key of record {number} is damaged. {_WAY_OUT}")
        return head

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"ledger: {self.path}: {error}. {_advice(error)}") from error


def read(path: Path) -> list[Entry]:
    """The events as they stand in the file, not verified; nothing is written, and a daemon may be at work.

    Raises:
        StoreError: if it cannot be read.
    """
    if not path.exists():
        return []
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=_BUSY_S)) as db:
            return list(_entries(db, 0, "", signed=_version(db, path) > 1))
    except sqlite3.Error as error:
        raise StoreError(f"ledger: {path}: {error}. {_advice(error)}") from error


def _version(db: sqlite3.Connection, path: Path) -> int:
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version > VERSION:
        raise StoreError(f"ledger: {path} was written by a newer fedtailor (version {version}); install that")
    return version


def _entries(db: sqlite3.Connection, id: int, last: str, signed: bool = True) -> Iterator[Entry]:
    """The events behind ``id``, whose hash is ``last``."""
    columns = f"{_COLUMNS}, {'signature' if signed else 'NULL'}"
    for row in db.execute(f"SELECT {columns} FROM events WHERE id > ? ORDER BY id", (id,)):
        entry = _entry(row, last)
        yield entry
        last = entry["hash"]


def _entry(row: tuple[Any, ...], before: str) -> Entry:
    id, kind, moment, *values, hash, signature = row
    record = {
        "number": id,
        "time": moment,
        "before": before,
        "fields": {"kind": kind, **dict(zip(BARE, values, strict=True))},
    }
    if kind == "key":
        record["key"] = record["fields"]["digest"]
    return {"record": record, "signature": signature, "hash": hash}


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
