"""A log that shows when it was changed: JSON lines, hash-chained, signed with the site's key, on disk before it returns.

The format of a line is in verify_audit.py, which anybody can run without fedtailor. A chain shows any change and any
gap. It cannot show that its end was cut off, or that an older copy was put back: compare :attr:`Chain.head` with a
note kept elsewhere, or an export with an earlier one.
"""

import fcntl
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedtailor import store
from fedtailor.client.signing import Signer, now
from fedtailor.client.verify_audit import Entry, Head, Wrong, canonical, follow
from fedtailor.errors import StoreError

WAY_OUT = (
    "Stop the daemon, move audit.jsonl and egress.jsonl aside, both, keep them as evidence, and tell whoever answers for "
    "this site's records; new ones begin at the next start, and a comparison with an earlier export will show it"
)
_log = logging.getLogger("fedtailor.client")


class Chain:
    """The log in the file ``path`` (mode 0600), created if it is missing; its name without ending is signed with it.

    Opening verifies every hash and the last signature, which vouches for all before it; later calls what came since.
    Threads and processes may append at once. Half a line, left by ``kill -9`` or a power cut, is moved to
    ``<path>.torn`` and a record says so.

    Args:
        seen: is told each entry, old and new, in order.

    Raises:
        StoreError: from any method, naming the record that is damaged, or why nothing could be written.
    """

    def __init__(self, path: Path, signer: Signer, seen: Callable[[Entry], None] = lambda entry: None) -> None:
        self.path, self.log, self._seen = path, path.stem, seen
        self._head, self._end, self._inode = Head(), 0, 0
        self._lock = threading.Lock()
        self.sign_with(signer)

    @property
    def head(self) -> str:
        """``NUMBER:HASH`` of the last record. Note it elsewhere."""
        return f"{self._head.number}:{self._head.hash}"

    def sign_with(self, signer: Signer) -> None:
        """Sign with another key from now on; a record says so, signed by the old key if the signer has it."""
        with self._alone() as handle:
            torn = self._catch_up(handle)
            self._signer = signer
            broken = self._head.key not in ("", signer.public, *signer.vouching)
            if broken:
                _log.warning("%s: the key changed, and the old one is not there to vouch for it", self.path)
            if torn or self._head.key != signer.public:
                self._write(handle, torn, *([] if torn else [{}]))

    def append(self, **fields: Any) -> str:
        """Add one record, durably; the new :attr:`head`. ValueError or TypeError if a field is not JSON."""
        with self._alone() as handle:
            self._write(handle, self._catch_up(handle), fields)
            return self.head

    def holds(self, head: str) -> bool:
        """Whether an earlier :attr:`head` is part of this log."""
        number = int(head.partition(":")[0])
        with self.path.open("rb") as file:
            line = next((line for at, line in enumerate(file, 1) if at == number), b"null")
        return number == 0 or (number <= self._head.number and head == f"{number}:{json.loads(line)['hash']}")

    def _catch_up(self, handle: int) -> bytes:
        """Verify what came since, and return what stands behind the last whole line."""
        found = os.fstat(handle)
        if found.st_size < self._end or self._inode not in (0, found.st_ino):
            raise StoreError(f"{self.path}: record {self._head.number} is gone: it was cut or replaced. {WAY_OUT}")
        self._inode, end, torn = found.st_ino, self._end, b""

        def entries() -> Iterator[Entry]:
            nonlocal end, torn
            with os.fdopen(os.dup(handle), "rb") as file:
                file.seek(end)
                for number, line in enumerate(file, self._head.number + 1):
                    if not line.endswith(b"\n"):
                        torn = line
                        return
                    end += len(line)
                    entry = parse(line, number)
                    self._seen(entry)
                    yield entry

        try:
            self._head = follow(self.log, entries(), self._head, every=False)
        except Wrong as error:
            raise StoreError(f"{self.path}: {error}. {WAY_OUT}") from error
        self._end = end
        return torn

    def _write(self, handle: int, torn: bytes, *records: dict[str, Any]) -> None:
        """Add ``records``, and before them, in place of torn bytes, one that names these."""
        if torn:
            self._set_aside(torn)
            records = ({"torn": len(torn), "sha256": hashlib.sha256(torn).hexdigest()}, *records)
        head, entries = self._head, []
        for fields in records:
            entries.append(self._signer.entry(self.log, head, now(), json.loads(json.dumps(fields, allow_nan=False))))
            head = _after(self.log, entries[-1], head)
        data = b"".join(canonical(entry) + b"\n" for entry in entries)
        try:
            if os.pwrite(handle, data, self._end) != len(data):
                raise OSError(28, "the disk is full")
        except OSError:
            os.ftruncate(handle, self._end)
            raise
        os.ftruncate(handle, self._end + len(data))  # after a longer torn line its rest stands there
        os.fsync(handle)
        self._head, self._end = head, self._end + len(data)
        for entry in entries:
            self._seen(entry)

    def _set_aside(self, torn: bytes) -> None:
        handle = os.open(
            self.path.with_name(self.path.name + ".torn"), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        with os.fdopen(handle, "wb") as file:
            file.write(torn + b"\n")
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _alone(self) -> Iterator[int]:
        try:
            with self._lock:
                new = 0 if self._inode else os.O_CREAT
                handle = os.open(self.path, new | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                try:
                    os.fchmod(handle, 0o600)
                    fcntl.flock(handle, fcntl.LOCK_EX)
                    yield handle
                finally:
                    os.close(handle)
                if new:
                    store.sync_name(self.path)
        except OSError as error:
            raise StoreError(
                f"{self.path} cannot be written: {error.strerror or error}; make room on the disk, or mend its "
                "permissions; nothing was recorded, and so nothing leaves"
            ) from error


def _after(log: str, entry: Entry, head: Head) -> Head:
    """The head behind an entry that was just signed here."""
    if "key" in entry["record"]:
        return follow(log, [entry], head)
    return head._replace(number=head.number + 1, hash=entry["hash"])


def parse(line: bytes, number: int) -> Entry:
    """One line; :class:`Wrong` if it is none."""
    try:
        entry: Entry = json.loads(line)
        if canonical(entry) + b"\n" == line:
            return entry
    except (ValueError, RecursionError):
        pass
    raise Wrong(number, "is not a line of a signed log")


def read(path: Path) -> list[Entry]:
    """The entries of a log as they stand in its file, not verified; half a line at the end is left out.

    Raises:
        StoreError: naming a line that is no entry.
    """
    if not path.exists():
        return []
    try:
        with path.open("rb") as file:
            return [parse(line, number) for number, line in enumerate(file, 1) if line.endswith(b"\n")]
    except (OSError, Wrong) as error:
        raise StoreError(f"{path}: {error}. {WAY_OUT}") from error


def rows(path: Path) -> list[dict[str, Any]]:
    """What the records of a log say, with their times; not verified."""
    records = [entry["record"] for entry in read(path)]
    return [{"time": record["time"], **record["fields"]} for record in records if record["fields"]]
