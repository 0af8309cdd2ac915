"""A site's durable record of privacy loss: reserve, run, settle.

Every reservation is on disk before the work starts and is never refunded, so that a crash can only ever count too much.
"""

import math
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from sqlite3 import Connection
from typing import Any, NamedTuple

from fedtailor.client.journal import Journal
from fedtailor.client.signing import Signer
from fedtailor.client.verify_audit import Entry as Record
from fedtailor.errors import RefusedError
from fedtailor.privacy import accounting
from fedtailor.privacy.accounting import Cap, Charge

__all__ = ["Cap", "Charge", "Entry", "Ledger", "Reservation"]


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
    """The ledger in the file ``path``, created if it is missing. ``signer`` signs its records; without, none is signed.

    Formal guarantee: over everything that was ever reserved for one data set, by any number of processes and through
    any crash, the composed epsilon is at most the cap of the last reservation that was granted. A data set is all
    charges linked by an account name or a fingerprint, transitively: renaming the data, or changing its rows under
    the same name, never resets the budget. Changing both at once does; the site's own configuration must not.

    Raises:
        StoreError: from any method, if the file is damaged, cannot be written or stays locked; nothing is half-written.
    """

    def __init__(self, path: Path, signer: Signer | None = None) -> None:
        self._journal = Journal(path, signer)

    def close(self) -> None:
        """Close the file; the ledger is of no use afterwards."""
        self._journal.close()

    def reserve(
        self,
        *,
        account: str,
        fingerprint: str,
        study: str,
        visit: str,
        charge: Charge,
        cap: Cap,
        promise: float = math.inf,
        again: bool = False,
    ) -> Reservation:
        """Charge ``account`` for one piece of work, durably, before it starts.

        The same study, visit, data and charge give the same reservation, and the same key until it is settled: work
        repeated after a crash then repeats its noise, and is one release at one charge. That holds only if everything
        else that the work reads is named by ``visit`` too. Any difference is a new charge.

        Args:
            account: the data set's name in the site's configuration.
            fingerprint: of the prepared rows.
            study: for the statement.
            visit: names one piece of work and all of its inputs.
            charge: what it costs.
            cap: the site's limit on everything ever spent.
            promise: the most epsilon, at the cap's delta, that ``study`` may ever spend on these data.
            again: charge anew if the visit is settled, because its stored output was lost.

        Raises:
            RefusedError: code ``budget``, if the charge does not fit under the cap, or ``promise``; nothing is written.
        """
        z, rate = float(charge.noise_multiplier), float(charge.rate)  # as SQLite gives them back, for the chain
        what = (account, fingerprint, study, visit, z, rate, charge.steps)
        with self._journal.transaction() as db:
            if (known := _find(db, what)) and not (again and known.settled_digest is not None):
                return known
            known_charges = _charges(db, account, fingerprint)
            spent = [each for _, each in known_charges]
            of_study = [each for name, each in known_charges if name == study]
            whole = accounting.epsilon([*of_study, charge], cap.delta)
            if whole > promise * (1 + 1e-9):
                raise RefusedError(
                    f"study {study!r} would spend epsilon {whole:.3f} on {account!r}; its plan promises at most "
                    f"{promise:g}",
                    code="promise",
                )
            after = accounting.epsilon([*spent, charge], cap.delta)
            if accounting.allowed(after, cap):
                key = secrets.token_bytes(32)
                return Reservation(self._journal.append("reserve", *what, None, key=key), key, None)
        before = accounting.epsilon(spent, cap.delta)
        fits = accounting.affordable(spent, charge, cap.epsilon, cap.delta)
        raise RefusedError(
            f"budget: {account!r} has spent epsilon {before:.3f} of {cap.epsilon:g} (delta {cap.delta:g}); this round "
            f"of study {study!r} would bring it to {after:.3f}; {fits} such rounds are still affordable. Ask for more "
            "noise or fewer steps, or let the site's policy raise its cap",
            code="budget",
        )

    def settle(self, reservation_id: int, digest: str) -> bool:
        """Record the hash of the work's output and erase its key; whether that was new.

        Raises:
            RefusedError: code ``settled``, if another output was recorded: one reservation pays for one release.
        """
        with self._journal.transaction() as db:
            row = db.execute("SELECT kind FROM events WHERE id = ?", (reservation_id,)).fetchone()
            if row != ("reserve",):
                raise RefusedError(f"reservation: there is no number {reservation_id} in the ledger", code="settled")
            if (known := _settled(db, reservation_id)) not in (None, digest):
                raise RefusedError(
                    f"reservation: {reservation_id} is settled with output {known}, not {digest}; reserve again",
                    code="settled",
                )
            if known is None:
                self._journal.append("settle", None, None, None, None, None, None, None, reservation_id, digest)
                db.execute("DELETE FROM keys WHERE reservation = ?", (reservation_id,))
        self._journal.erase()
        return known is None

    def charges(self, account: str, fingerprint: str, *, without: str | None = None) -> list[Charge]:
        """Every charge linked to this data set, settled or not; those of the study ``without`` left out."""
        with self._journal.transaction() as db:
            return [charge for study, charge in _charges(db, account, fingerprint) if study != without]

    def spent(self, *, account: str, fingerprint: str, delta: float) -> float:
        """The composed epsilon of :meth:`charges`."""
        return accounting.epsilon(self.charges(account, fingerprint), delta)

    def affordable(self, *, account: str, fingerprint: str, charge: Charge, cap: Cap) -> int:
        """How many more times ``charge`` fits under ``cap``."""
        return accounting.affordable(self.charges(account, fingerprint), charge, cap.epsilon, cap.delta)

    def statement(self) -> list[Entry]:
        """Every reservation, oldest first."""
        with self._journal.transaction() as db:
            rows = db.execute(
                "SELECT e.id, e.time, e.account, e.fingerprint, e.study, e.visit, e.noise_multiplier, e.rate, e.steps,"
                " s.digest FROM events e LEFT JOIN events s ON s.kind = 'settle' AND s.reservation = e.id"
                " WHERE e.kind = 'reserve' ORDER BY e.id"
            ).fetchall()
        return [Entry(id, t, a, f, s, v, Charge(z, rate, n), end) for id, t, a, f, s, v, z, rate, n, end in rows]

    def head(self) -> tuple[int, str]:
        """The number of events and the hash of the last. Note it elsewhere: see :meth:`contains`."""
        with self._journal.transaction():
            return self._journal.head

    def export(self) -> list[Record]:
        """Every record with its hash and signature, for verify_audit.py; no keys."""
        return self._journal.entries()

    def sign_with(self, signer: Signer) -> None:
        """Sign with another key from now on; a record says so, signed by the old key if the signer has it."""
        self._journal.sign_with(signer)

    def contains(self, head: tuple[int, str]) -> bool:
        """Whether an earlier :meth:`head` is part of this ledger; if not, an older copy was put back."""
        with self._journal.transaction() as db:
            row = db.execute("SELECT hash FROM events WHERE id = ?", (head[0],)).fetchone()
        return head[0] == 0 or bool(row == (head[1],))


def _find(db: Connection, what: tuple[Any, ...]) -> Reservation | None:
    row = db.execute(
        "SELECT id FROM events WHERE kind = 'reserve' AND account = ? AND fingerprint = ? AND study = ?"
        " AND visit = ? AND noise_multiplier = ? AND rate = ? AND steps = ? ORDER BY id DESC LIMIT 1",
        what,
    ).fetchone()
    if row is None:
        return None
    key = db.execute("SELECT key FROM keys WHERE reservation = ?", row).fetchone()
    return Reservation(row[0], key and key[0], _settled(db, row[0]))


def _settled(db: Connection, id: int) -> str | None:
    row = db.execute("SELECT digest FROM events WHERE kind = 'settle' AND reservation = ?", (id,)).fetchone()
    return None if row is None else str(row[0])


def _charges(db: Connection, account: str, fingerprint: str) -> list[tuple[str, Charge]]:
    accounts, prints, before = {account}, {fingerprint}, 0
    pairs = db.execute("SELECT DISTINCT account, fingerprint FROM events WHERE kind = 'reserve'").fetchall()
    while before != (before := len(accounts) + len(prints)):
        linked = [(a, f) for a, f in pairs if a in accounts or f in prints]
        accounts |= {a for a, _ in linked}
        prints |= {f for _, f in linked}
    rows = db.execute(
        "SELECT account, study, noise_multiplier, rate, steps FROM events WHERE kind = 'reserve' ORDER BY id"
    )
    return [(study, Charge(z, rate, steps)) for a, study, z, rate, steps in rows if a in accounts]
