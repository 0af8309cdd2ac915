"""A site's durable record of privacy loss: reserve, run, settle.

Every reservation is written to disk before the work starts and is never refunded, so that a crash can only ever count
too much. One SQLite file (mode 0600, write-ahead log, synchronous) holds an append-only, hash-chained table of events
and the secret keys of work that is not settled yet.
"""

import hashlib
import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from fedtailor.errors import RefusedError, StoreError
from fedtailor.privacy import accounting
from fedtailor.privacy.accounting import Cap, Charge

__all__ = ["Cap", "Charge", "Entry", "Ledger", "Reservation"]

_COLUMNS = "id, kind, time, account, fingerprint, study, visit, noise_multiplier, rate, steps, reservation, digest"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, time TEXT NOT NULL,
    account TEXT, fingerprint TEXT, study TEXT, visit TEXT, noise_multiplier REAL, rate REAL, steps INTEGER,
    reservation INTEGER, digest TEXT NOT NULL, hash TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS keys (reservation INTEGER PRIMARY KEY, key BLOB NOT NULL);
PRAGMA user_version = 1;
"""
_WAY_OUT = (
    "Stop the daemon and restore the newest copy of this file that opens; never delete it, because the site would "
    "forget what it has spent and could exceed its privacy budget"
)
_BUSY_S = 30.0


@dataclass(frozen=True)
class Reservation:
    """Permission to do one piece of work once. ``key`` seeds its noise and sample; it is None once it is settled."""

    id: int
    key: bytes | None = field(repr=False)
    settled_digest: str | None


class Entry(NamedTuple):
    """One reservation, for people."""

    id: int
    time: str  # UTC
    account: str
    fingerprint: str
    study: str
    visit: str
    charge: Charge
    settled_digest: str | None  # None: not settled; it counts all the same


class Ledger:
    """The ledger in the file ``path``, created if it is missing.

    Formal guarantee: over everything that was ever reserved for one data set, by any number of processes and through
    any crash, the composed epsilon stays at most the cap of the last reservation that was granted. A data set is all
    charges linked by an account name or a fingerprint, transitively: renaming the data, or changing its rows under
    the same name, never resets the budget. Changing both at once does; the site's own configuration must not.

    The chain shows any edit. It cannot show that a whole older copy was put back: compare :meth:`head` with a note
    kept elsewhere.

    Raises:
        StoreError: from any method, if the file is damaged, cannot be written or stays locked; nothing is half-written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock, self._seen = path, threading.RLock(), (0, "")
        with self._reading():
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            os.chmod(path, 0o600)  # SQLite gives its side files the same mode
            self._db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            with self._reading():
                self._prepare()
            with self._transaction():
                pass
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        self._db.execute("PRAGMA secure_delete = ON")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA journal_mode = WAL")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > 1:
            raise StoreError(f"ledger: {self.path} was written by a newer fedtailor (version {version}); install that")
        if version == 0:
            self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
            folder = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(folder)  # or the new file's name could be lost with the power
            os.close(folder)

    def close(self) -> None:
        """Close the file; the ledger is of no use afterwards."""
        with self._lock:
            self._db.close()

    def reserve(
        self,
        *,
        account: str,
        fingerprint: str,
        study: str,
        visit: str,
        charge: Charge,
        cap: Cap,
        again: bool = False,
    ) -> Reservation:
        """Charge ``account`` for one piece of work, durably, before it starts.

        The same visit, data and charge give the same reservation, and the same key until it is settled: work repeated
        after a crash then repeats its noise, and is one release at one charge. That holds only if everything else that
        the work reads is named by ``visit`` too. Any difference is a new charge.

        Args:
            account: the data set's name in the site's configuration.
            fingerprint: of the prepared rows.
            study: for the statement.
            visit: names one piece of work and all of its inputs.
            charge: what it costs.
            cap: the site's limit on everything ever spent.
            again: charge anew if the visit is settled, because its stored output was lost.

        Raises:
            RefusedError: code ``budget``, if the charge does not fit; nothing is written.
        """
        z, rate = float(charge.noise_multiplier), float(charge.rate)  # as SQLite gives them back, or the chain breaks
        what = (account, fingerprint, study, visit, z, rate, charge.steps)
        with self._transaction():
            if (known := self._find(what)) and not (again and known.settled_digest is not None):
                return known
            spent = self._charges(account, fingerprint)
            before = accounting.epsilon(spent, cap.delta)
            after = accounting.epsilon([*spent, charge], cap.delta)
            if accounting.allowed(after, cap):
                key = secrets.token_bytes(32)
                id = self._append("reserve", *what, None, _commitment(key))
                self._db.execute("INSERT INTO keys VALUES (?, ?)", (id, key))
                return Reservation(id, key, None)
        fits = accounting.affordable(spent, charge, cap.epsilon, cap.delta)
        raise RefusedError(
            f"budget: {account!r} has spent epsilon {before:.3f} of {cap.epsilon:g} (delta {cap.delta:g}); this round "
            f"of study {study!r} would bring it to {after:.3f}; {fits} such rounds are still affordable. Ask for more "
            "noise or fewer steps, or let the site's policy raise its cap",
            code="budget",
        )

    def settle(self, reservation_id: int, digest: str) -> None:
        """Record the hash of the work's output and erase its key. Settling again with the same hash does nothing.

        Raises:
            RefusedError: code ``settled``, if another output was recorded: one reservation pays for one release.
        """
        with self._transaction():
            row = self._db.execute("SELECT kind FROM events WHERE id = ?", (reservation_id,)).fetchone()
            if row != ("reserve",):
                raise RefusedError(f"reservation: {reservation_id} is not in {self.path}", code="settled")
            if (known := self._settled(reservation_id)) not in (None, digest):
                raise RefusedError(
                    f"reservation: {reservation_id} is settled with output {known}, not {digest}; reserve again",
                    code="settled",
                )
            if known is None:
                self._append("settle", None, None, None, None, None, None, None, reservation_id, digest)
                self._db.execute("DELETE FROM keys WHERE reservation = ?", (reservation_id,))
        with self._reading():  # the write-ahead log still holds the page with the key
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def charges(self, account: str, fingerprint: str) -> list[Charge]:
        """Every charge linked to this data set, settled or not."""
        with self._transaction():
            return self._charges(account, fingerprint)

    def spent(self, *, account: str, fingerprint: str, delta: float) -> float:
        """The composed epsilon of :meth:`charges`."""
        return accounting.epsilon(self.charges(account, fingerprint), delta)

    def affordable(self, *, account: str, fingerprint: str, charge: Charge, cap: Cap) -> int:
        """How many more times ``charge`` fits under ``cap``."""
        return accounting.affordable(self.charges(account, fingerprint), charge, cap.epsilon, cap.delta)

    def statement(self) -> list[Entry]:
        """Every reservation, oldest first."""
        with self._transaction():
            rows = self._db.execute(
                "SELECT e.id, e.time, e.account, e.fingerprint, e.study, e.visit, e.noise_multiplier, e.rate, e.steps,"
                " s.digest FROM events e LEFT JOIN events s ON s.kind = 'settle' AND s.reservation = e.id"
                " WHERE e.kind = 'reserve' ORDER BY e.id"
            ).fetchall()
        return [Entry(*row[:6], Charge(*row[6:9]), row[9]) for row in rows]

    def head(self) -> tuple[int, str]:
        """The number of events and the hash of the last: a later ledger must still contain this event."""
        with self._transaction():
            return self._seen

    def contains(self, head: tuple[int, str]) -> bool:
        """Whether an earlier :meth:`head` is part of this ledger; if not, an older copy was put back."""
        with self._transaction():
            row = self._db.execute("SELECT hash FROM events WHERE id = ?", (head[0],)).fetchone()
        return head[0] == 0 or row == (head[1],)

    def _find(self, what: tuple[Any, ...]) -> Reservation | None:
        row = self._db.execute(
            "SELECT id FROM events WHERE kind = 'reserve' AND account = ? AND fingerprint = ? AND study = ?"
            " AND visit = ? AND noise_multiplier = ? AND rate = ? AND steps = ? ORDER BY id DESC LIMIT 1",
            what,
        ).fetchone()
        if row is None:
            return None
        key = self._db.execute("SELECT key FROM keys WHERE reservation = ?", row).fetchone()
        return Reservation(row[0], key and key[0], self._settled(row[0]))

    def _settled(self, id: int) -> str | None:
        row = self._db.execute(
            "SELECT digest FROM events WHERE kind = 'settle' AND reservation = ?", (id,)
        ).fetchone()
        return None if row is None else str(row[0])

    def _charges(self, account: str, fingerprint: str) -> list[Charge]:
        accounts, prints, before = {account}, {fingerprint}, 0
        pairs = self._db.execute("SELECT DISTINCT account, fingerprint FROM events WHERE kind = 'reserve'").fetchall()
        while before != (before := len(accounts) + len(prints)):
            linked = [(a, f) for a, f in pairs if a in accounts or f in prints]
            accounts |= {a for a, _ in linked}
            prints |= {f for _, f in linked}
        rows = self._db.execute(
            "SELECT account, noise_multiplier, rate, steps FROM events WHERE kind = 'reserve' ORDER BY id"
        )
        return [Charge(z, rate, steps) for a, z, rate, steps in rows if a in accounts]

    def _append(self, kind: str, *values: Any) -> int:
        row = (self._seen[0] + 1, kind, datetime.now(UTC).isoformat(timespec="seconds"), *values)
        digest = _chain(self._seen[1], row)
        self._db.execute(f"INSERT INTO events ({_COLUMNS}, hash) VALUES ({', '.join('?' * 13)})", (*row, digest))
        return row[0]

    def _verify(self) -> tuple[int, str]:
        """Follow the chain from the last event that this object saw, and check every stored key."""
        id, last = self._seen
        if id and self._db.execute("SELECT hash FROM events WHERE id = ?", (id,)).fetchone() != (last,):
            raise StoreError(f"ledger: {self.path}: record {id} changed since it was read. {_WAY_OUT}")
        for row in self._db.execute(f"SELECT {_COLUMNS}, hash FROM events WHERE id > ? ORDER BY id", (id,)):
            if row[0] != id + 1 or row[-1] != _chain(last, row[:-1]):
                raise StoreError(f"ledger: {self.path}: record {id + 1} is damaged, or was edited. {_WAY_OUT}")
            id, last = row[0], row[-1]
        sequence = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'events'").fetchone()
        if (sequence or (0,))[0] != id:
            raise StoreError(f"ledger: {self.path}: record {id + 1} is missing. {_WAY_OUT}")
        keys = dict(self._db.execute("SELECT reservation, key FROM keys").fetchall())
        for number, digest in self._db.execute(
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

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Alone with the file, verified: commit at the end, or leave it as it was."""
        with self._reading():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._seen = self._verify()
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise


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
    if "permission" in text or "readonly" in text or "read-only" in text or "unable to open" in text:
        return "Let the daemon's user own the file and its folder"
    return _WAY_OUT
