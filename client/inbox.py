"""What arrived and what was answered, on the site's disk.

A message is confirmed to the coordinator only when it lies whole in the inbox; an answer is sent only when it lies
whole in the outbox. Both appear by one rename, so that a daemon killed at any point finds all of it or none.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fedtailor import store
from fedtailor.client.fleet import Envelope
from fedtailor.errors import ConfigError
from fedtailor.wire import Report, Visit


class Entry(NamedTuple):
    """A message in the inbox."""

    folder: Path
    envelope: Envelope

    def head(self) -> str:
        """The head's JSON as it came."""
        return (self.folder / "head.json").read_text()

    @property
    def payload(self) -> Path:
        """The cast, a safetensors file."""
        return self.folder / "payload.safetensors"


def key_of(visit: Visit) -> str:
    """A name for one piece of work: the same visit, asked again by whatever message, has the same key."""
    parts = [visit.run, visit.round, visit.train, visit.evaluate, visit.baseline, visit.plan, visit.cast_sha256]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


def place(inbox: Path, envelope: Envelope, head: str, payload: Path) -> None:
    """Make a message durable: ``payload`` is moved in. A message that is there already is left alone."""
    name = hashlib.sha256(envelope.message_id.encode()).hexdigest()[:40]  # the coordinator's word: not for a path
    target = inbox / f"{int(envelope.created_at * 1000):015d}-{name}"
    if target.exists():
        payload.unlink(missing_ok=True)
        return
    draft = inbox / f".{target.name}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700)
    os.replace(payload, draft / "payload.safetensors")
    store.write_text(draft / "head.json", head)
    store.write_json(draft / "envelope.json", envelope._asdict())
    store.commit_folder(draft, target)


def waiting(inbox: Path) -> Iterator[Entry]:
    """Messages not yet answered, oldest first; what a crash left half-written is cleared away."""
    for folder in sorted(inbox.iterdir()):
        if folder.name.startswith("."):
            continue
        try:
            yield Entry(folder, Envelope(**json.loads((folder / "envelope.json").read_text())))
        except (OSError, ValueError, TypeError):
            shutil.rmtree(folder, ignore_errors=True)


def clear_drafts(folder: Path) -> None:
    """Remove what an earlier process was writing when it ended."""
    for draft in folder.glob(".*"):
        shutil.rmtree(draft, ignore_errors=True) if draft.is_dir() else draft.unlink(missing_ok=True)


def drop(entry: Entry) -> None:
    """Forget a message that was answered."""
    shutil.rmtree(entry.folder, ignore_errors=True)


class Stored(NamedTuple):
    """An answer in the outbox."""

    report: Report
    payload: bytes  # salted
    reservation: int | None  # what the ledger charged for it
    listed: dict[str, Any] = {}  # tensors and norm, for the egress log


def commit(
    outbox: Path, draft: Path, visit: Visit, report: Report, reservation: int | None, listed: dict[str, Any]
) -> Path:
    """Make an answer durable; ``draft`` holds ``payload`` (salted). From here on it may leave."""
    store.write_text(draft / "report.json", report.model_dump_json())
    known = {"run": visit.run, "round": visit.round, "reservation": reservation, "listed": listed}
    store.write_json(draft / "visit.json", known)
    target = outbox / key_of(visit)
    store.commit_folder(draft, target)
    return target


def stored(outbox: Path, visit: Visit) -> Stored | None:
    """The answer to a visit that was answered before."""
    folder = outbox / key_of(visit)
    if not folder.exists():
        return None
    try:
        report = Report.model_validate_json((folder / "report.json").read_text())
        known = json.loads((folder / "visit.json").read_text())
        return Stored(report, (folder / "payload").read_bytes(), known["reservation"], known["listed"])
    except (OSError, ValueError, KeyError, TypeError):  # damaged: the work is done anew, and charged anew if settled
        shutil.rmtree(folder, ignore_errors=True)
        return None


def forget_old(folder: Path, days: float = 30.0) -> None:
    """Remove what lies in ``folder`` since before ``days``: the answers and memories of runs that are long over."""
    for old in folder.iterdir():
        if old.is_dir() and time.time() - old.stat().st_mtime > days * 86400:
            shutil.rmtree(old, ignore_errors=True)


def tidy(outbox: Path, visit: Visit) -> None:
    """Forget answers of earlier rounds of the same run: the coordinator has moved on from them."""
    for folder in outbox.iterdir():
        try:
            known: dict[str, Any] = json.loads((folder / "visit.json").read_text())
        except (OSError, ValueError):
            continue
        if known["run"] == visit.run and known["round"] < visit.round - 1:
            shutil.rmtree(folder, ignore_errors=True)


def may_leave(outbox: Path, visit: Visit) -> bool:
    """Whether a person has released an answer that is held."""
    return (outbox / key_of(visit) / "released").exists()


def hold(outbox: Path, visit: Visit) -> None:
    """Mark an answer as waiting for a person."""
    (outbox / key_of(visit) / "held").touch()


def held(outbox: Path) -> list[dict[str, Any]]:
    """Answers that wait for a person, oldest first."""
    rows = []
    for mark in sorted(outbox.glob("*/held"), key=lambda path: path.stat().st_mtime):
        if not (mark.parent / "released").exists():
            known = json.loads((mark.parent / "visit.json").read_text())
            size = (mark.parent / "payload").stat().st_size
            rows.append({"answer": mark.parent.name[:12], "run": known["run"], "round": known["round"], "bytes": size})
    return rows


def release(outbox: Path, word: str) -> dict[str, Any]:
    """Let a held answer leave, by the beginning of its name.

    Raises:
        ConfigError: if none is held by that name.
    """
    for row in held(outbox):
        if word and row["answer"].startswith(word[:12]):
            for folder in outbox.glob(f"{row['answer']}*"):
                (folder / "released").touch()
            return row
    raise ConfigError(f"answer {word!r}: none is held by that name; see: fedtailor client held")
