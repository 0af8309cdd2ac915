"""The one gate through which anything leaves a site. It runs in the daemon, outside the training process.

An answer is compared with what the plan says will leave: names, shapes, dtypes, finite values, and which metrics. One
thing wrong and the whole answer is dropped. What passes is salted, made durable, written to the egress log, and sent.
"""

import hashlib
import secrets
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fedtailor import recipe as recipes
from fedtailor import store, wire
from fedtailor.client import inbox
from fedtailor.client.chain import Chain
from fedtailor.client.fleet import Envelope, Fleet
from fedtailor.config import build
from fedtailor.errors import RefusedError, WireError
from fedtailor.policy import Policy
from fedtailor.recipe import Recipe
from fedtailor.strategy import Strategy
from fedtailor.study import Plan
from fedtailor.wire import Report, Visit


@lru_cache(maxsize=4)
def agreed(plan_text: str) -> wire.Spec:
    """What a plan says will leave: the names, dtypes and shapes of the summand."""
    plan = Plan.parse(plan_text)
    recipe, strategy = build(plan.recipe, Recipe), build(plan.strategy, Strategy)
    with torch.device("meta"):  # a hostile plan may name a model of any size
        return wire.spec_of(wire.summand(plan, strategy, recipes.shapes(recipe)))


def admit(
    out: Path,
    outbox: Path,
    visit: Visit,
    policy: Policy,
    *,
    epsilon: float | None,
    test_rows: int,
    reservation: int | None,
) -> None:
    """Check what the training process left in ``out`` and make it durable in the outbox.

    Raises:
        RefusedError: with code ``airlock-…``; nothing of the answer leaves then.
    """
    try:
        report = wire.parse_head(Report, (out / "work.json").read_text())
        if (report.run, report.round) != (visit.run, visit.round):
            raise WireError("an answer to another visit", code="round")
        path = out / "summand.safetensors"
        spec = agreed(visit.plan)
        if path.stat().st_size > wire.size_limit(spec):
            raise WireError(f"an answer of {path.stat().st_size} bytes", code="oversized")
        with safe_open(path, framework="pt") as file:
            if file.metadata():
                raise WireError("tensors that carry text", code="metadata")
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        wire.check(flat, spec if visit.train else {})
        payload = b"".join(store.safetensors(flat))  # written anew: a header may carry more than its readers look at
    except (WireError, SafetensorError, OSError, UnicodeDecodeError) as error:
        code = error.code if isinstance(error, WireError) else "format"
        raise RefusedError(f"the airlock dropped an answer: {error}", code=f"airlock-{code}") from error
    digest, salt = hashlib.sha256(payload).hexdigest(), secrets.token_hex(32)
    may = policy.metrics and test_rows >= policy.minimum_count
    checked = Report(
        run=visit.run,
        round=visit.round,
        rows=report.rows,
        train_rows=report.train_rows,
        metrics=report.metrics if may and visit.evaluate else None,
        baseline=report.baseline if may and visit.baseline else None,
        epsilon=epsilon,
        seconds=round(report.seconds, 1 if report.seconds > 1 else 3),
        summand_sha256=digest,
        salt=salt,
    )
    draft = outbox / f".{inbox.key_of(visit)}"
    draft.mkdir(mode=0o700, exist_ok=True)
    store.write_bytes(draft / "payload", wire.salted(salt)(payload))
    inbox.commit(outbox, draft, visit, checked, reservation)


def release(fleet: Fleet, envelope: Envelope, report: Report, payload: bytes, egress: Chain) -> int:
    """Send an answer that lies in the outbox; every answer that leaves, leaves here.

    It is written to the log first: what the log lists may have left, and what it does not list has not.
    """
    size = len(payload) + len(report.model_dump_json())
    egress.append(run=report.run, round=report.round, bytes=size, sha256=report.summand_sha256, epsilon=report.epsilon,
         metrics=sorted(report.metrics or ()), baseline=sorted(report.baseline or ()))  # fmt: skip
    return fleet.answer(envelope, wire.record(report, payload), report.seconds)


def decline(fleet: Fleet, envelope: Envelope, code: str, egress: Chain) -> None:
    """Answer with a code word; never a text, which could carry data."""
    word = "".join(c for c in code if c.isascii() and (c.isalnum() or c in "-_"))[:40]
    egress.append(refused=word)
    fleet.answer(envelope, word, 0.0)
