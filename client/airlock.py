"""The one gate through which anything leaves a site. It runs in the daemon, outside the training process.

An answer is compared with the list in the signed proposal: names, shapes, dtypes, finite values, norm, bytes, and which
metrics. One thing wrong and the whole answer is dropped. What passes is written anew (packed, where the proposal says so),
salted, made durable, written to the egress log, and sent.
"""

import hashlib
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from fedtailor import packing, store, wire
from fedtailor.client import inbox
from fedtailor.client.chain import Chain
from fedtailor.client.fleet import Envelope, Fleet
from fedtailor.client.inbox import Stored
from fedtailor.errors import RefusedError, WireError
from fedtailor.leaving import METRIC_DIGITS, Leaving, length
from fedtailor.policy import Policy
from fedtailor.privacy.csprng import Csprng
from fedtailor.receipts import Head
from fedtailor.recipe import Metrics
from fedtailor.wire import Report, Visit

ANSWER = ("dtype", "format", "head", "keys", "metadata", "metrics", "nonfinite", "norm", "oversized", "round", "shape")
WORDS = frozenset(
    [f"airlock-{word}" for word in ANSWER]
    + """budget cast changed clip code cohort config confinement connection contract crashed delta dtype epsilon
    epsilon-per-study expired failed format head hours huge keys leaves ledger ledger-head memory metadata metrics noise nonfinite norm
    oversized partners pending plan plugin privacy promise receipt recipe refused replayed rolled-back roster round rounds seal
    settled shape signature split steps stopped store strategy study time unknown untrusted upload wire withdrawn
    worker""".split()
)  # all that a site ever says of why it does not answer; a word of the training process's own could carry data


class Facts(NamedTuple):
    """What the daemon itself says in an answer."""

    epsilon: float | None = None  # spent on this data set by this study
    rows: int = 0  # of the data set, as described when the file was read
    train_rows: int = 0
    test_rows: int = 0
    reservation: int | None = None
    witness: str | None = None
    head: Head | None = None
    metric_key: bytes | None = None  # of the ledger's, where the policy noises metrics


def admit(out: Path, outbox: Path, visit: Visit, leaves: Leaving, policy: Policy, facts: Facts) -> None:
    """Check what the training process left in ``out`` and make it durable in the outbox.

    Raises:
        RefusedError: with code ``airlock-…``; nothing of the answer leaves then.
    """
    try:
        report = wire.parse_head(Report, _once(out / "work.json", wire.HEAD_LIMIT, "head").decode())
        if (report.run, report.round) != (visit.run, visit.round):
            raise WireError("an answer to another visit", code="round")
        whole = _once(out / "summand.safetensors", leaves.bytes, "oversized")
        if b'"__metadata__"' in whole[8 : 8 + int.from_bytes(whole[:8], "little")]:
            raise WireError("tensors that carry text", code="metadata")
        flat = load(whole)
        leaves.check(flat, train=visit.train)
        may = policy.metrics and facts.test_rows >= policy.minimum_count
        found = {
            "metrics": report.metrics if visit.evaluate else None,
            "personal": report.personal if visit.evaluate and leaves.models == 2 else None,
            "baseline": report.baseline if visit.baseline else None,
        }
        measured = {which: leaves.rounded(m) if m and may else None for which, m in found.items()}
        if policy.metric_noise is not None:
            std = policy.metric_noise / max(facts.test_rows, 1)
            measured = {which: _noised(m, std, facts.metric_key, which) for which, m in measured.items()}
        # written anew, in the one form that these tensors have: a file may carry more than its readers look at
        payload = b"".join(packing.pack(flat) if leaves.packed else store.safetensors(flat))
    except (WireError, SafetensorError, OSError, UnicodeDecodeError) as error:
        code = error.code if isinstance(error, WireError) else "format"
        raise RefusedError(f"the airlock dropped an answer: {error}", code=f"airlock-{code}") from error
    seconds = round(report.seconds, 1 if report.seconds > 1 else 3)
    said = {**measured, "seconds": seconds}
    listed: dict[str, object] = {
        "tensors": {name: list(leaf.shape) for name, leaf in flat.items()},
        "norm": round(length(flat), 6),
    }
    _commit(outbox, visit, payload, said, facts, listed)


def _noised(metrics: Metrics | None, std: float, key: bytes | None, purpose: str) -> Metrics | None:
    """The accuracy with noise, and nothing else: what one record does to the other metrics is not bounded.

    Formal guarantee: post-processing (rounding, the range) of one Gaussian mechanism on the share of held-out rows that
    are decided rightly; see :func:`fedtailor.policy.metric_charge`. The key is the ledger's, and repeats a release.
    """
    if metrics is None or metrics.get("accuracy") is None or key is None:
        return None
    drawn = float(Csprng(key).derive(f"metric/{purpose}").normal((1,), std, torch.float64)[0])
    exact = metrics["accuracy"]
    assert exact is not None
    return {"accuracy": min(max(round(exact + drawn, METRIC_DIGITS), 0.0), 1.0)}


def _once(path: Path, most: int, code: str) -> bytes:
    """What lies in a file, read once: who made it may change it while it is looked at, or have put a link there.

    Raises:
        WireError: ``code`` where it holds more than ``most`` bytes.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise WireError(f"{path.name} is not a file", code="format")
        content = file.read(most + 1)
    if len(content) > most:
        raise WireError(f"{path.name} has more than {most} bytes", code=code)
    return content


def agree(outbox: Path, visit: Visit, facts: Facts) -> None:
    """Answer a visit that asks for nothing but agreement."""
    _commit(outbox, visit, b"".join(store.safetensors({})), {}, facts, {"agreed": True})


def _commit(
    outbox: Path, visit: Visit, payload: bytes, said: Mapping[str, object], facts: Facts, listed: dict[str, object]
) -> None:
    digest, salt = hashlib.sha256(payload).hexdigest(), secrets.token_hex(32)
    ours = {"run": visit.run, "round": visit.round, "rows": facts.rows, "train_rows": facts.train_rows,
            "epsilon": facts.epsilon, "summand_sha256": digest, "salt": salt, "witness": facts.witness,
            "head": facts.head}  # fmt: skip
    draft = outbox / f".{inbox.key_of(visit)}"
    draft.mkdir(mode=0o700, exist_ok=True)
    store.write_bytes(draft / "payload", wire.salted(salt)(payload))
    inbox.commit(outbox, draft, visit, Report.model_validate({**said, **ours}), facts.reservation, listed)


def release(fleet: Fleet, envelope: Envelope, answer: Stored, egress: Chain) -> int:
    """Send an answer that lies in the outbox; every answer that leaves, leaves here.

    It is written to the log first: what the log lists may have left, and what it does not list has not.
    """
    report, payload = answer.report, answer.payload
    size = len(payload) + len(report.model_dump_json())
    egress.append(run=report.run, round=report.round, bytes=size, sha256=report.summand_sha256, epsilon=report.epsilon,
         metrics=sorted(report.metrics or ()), personal=sorted(report.personal or ()),
         baseline=sorted(report.baseline or ()), rows=report.rows,
         **answer.listed)  # fmt: skip
    return fleet.answer(envelope, wire.record(report, payload), report.seconds)


def decline(fleet: Fleet, envelope: Envelope, code: str, egress: Chain) -> None:
    """Answer with a code word of the vocabulary; never a text, which could carry data."""
    egress.append(refused=word(code))
    fleet.answer(envelope, word(code), 0.0)


def word(code: str) -> str:
    """A code, if it is of the vocabulary; the training process may have made it up."""
    return code if code in WORDS else "failed"
