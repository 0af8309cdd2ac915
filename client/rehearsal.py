"""A round of a study on this site's data, of which nothing leaves and nothing is kept: what taking part would take."""

import hashlib
import secrets
import shutil
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from fedtailor import recipe as recipes
from fedtailor import seals, store, tree
from fedtailor.client import airlock, inbox
from fedtailor.client.plans import Known
from fedtailor.client.visits import Described, Visits
from fedtailor.config import build
from fedtailor.policy import charges_of
from fedtailor.privacy.accounting import Charge, epsilon
from fedtailor.privacy.planning import strategy_of
from fedtailor.receipts import Head
from fedtailor.recipe import Recipe
from fedtailor.study import Plan
from fedtailor.wire import Visit


class Forecast(NamedTuple):
    """What a study would take of this site, if it goes as its plan says."""

    epsilon: float | None  # of the study, at its delta
    epsilon_after: float | None  # of the data set over all studies
    bytes_out: int  # that the egress log will list; of a packed study if every round packs like the rehearsed one
    bytes_in: int
    seconds_a_round: float  # of this site's work
    minutes: float  # of it in all
    memory_mb: int | None  # the training process's peak; None where the host does not tell


def rehearse(visits: Visits, known: Known, data: Described, spent: list[Charge]) -> Forecast:
    """Do one training and one evaluation with a key that is thrown away, and pass them through the airlock.

    Raises:
        RefusedError: what the airlock would say.
        FedtailorError: what the training process would.
    """
    plan, policy, kinds = known.proposal.plan, visits.config.policy, _kinds(known.proposal.plan, visits.config.site)
    cast = _cast(plan)
    sizes, took = [], []
    with tempfile.TemporaryDirectory(dir=visits.home.state, prefix=".rehearsal-") as scratch:
        for kind in kinds:
            visit, began = _visit(known, cast, **kind.asks), time.monotonic()
            _perform(visits, visit, known, data, cast if kind.asks else b"", Path(scratch))
            took.append(time.monotonic() - began)
            stored = inbox.stored(Path(scratch), visit)
            assert stored is not None
            sizes.append(len(stored.payload) + len(stored.report.model_dump_json()))
    charges = charges_of(policy, plan, known.proposal.leaves.models)
    delta = plan.record.delta if plan.record else policy.delta
    training = charges[: plan.rounds] if plan.record else []
    return Forecast(
        epsilon=epsilon(training, delta) if training else None,
        epsilon_after=epsilon([*spent, *charges], delta) if charges else None,
        bytes_out=sum(kind.times * size for kind, size in zip(kinds, sizes, strict=True)),
        bytes_in=sum(kind.times for kind in kinds[1:])
        * (len(cast) + len(_visit(known, cast, train=True).model_dump_json())),
        seconds_a_round=round(took[1], 3),
        minutes=round(sum(kind.times * seconds for kind, seconds in zip(kinds, took, strict=True)) / 60, 2),
        memory_mb=_peak_mb(visits.workshop.pid),
    )


class _Kind(NamedTuple):
    """A kind of visit that a study makes, and how often."""

    asks: dict[str, bool]
    times: int


def _kinds(plan: Plan, site: str) -> list[_Kind]:
    asked = [round for round in range(plan.rounds) if site in plan.asked(round)]
    evaluated = sum(round % plan.evaluation.every == 0 for round in asked)
    kinds = [_Kind({}, 1), _Kind({"train": True, "evaluate": True}, evaluated)]
    if evaluated < len(asked):
        kinds.append(_Kind({"train": True}, len(asked) - evaluated))
    return [*kinds, _Kind({"evaluate": True, "baseline": plan.evaluation.baseline}, 1)]


def _visit(known: Known, cast: bytes, train: bool = False, evaluate: bool = False, baseline: bool = False) -> Visit:
    signed = (known.folder / "signed.json").read_text()
    return Visit(
        run=known.proposal.run,
        round=0,
        train=train,
        evaluate=evaluate,
        baseline=baseline,
        plan=known.proposal.plan.canonical(),
        cast_sha256=hashlib.sha256(cast).hexdigest(),
        proposal=signed,
    )


def _perform(visits: Visits, visit: Visit, known: Known, data: Described, cast: bytes, outbox: Path) -> None:
    head = visits.head()
    if not cast:
        airlock.agree(outbox, visit, airlock.Facts(head=head))
        return
    if head is None and known.proposal.plan.record is not None:  # the study's first round will make one
        head = Head(count=1, hash="0" * 64, signature=seals.sign(visits.key, "ledger-head", ""))
    own = f"rehearsal-{secrets.token_hex(8)}"  # two people may rehearse at a time
    entry, out = visits.home.inbox / f".{own}", visits.home.state / "work" / own
    facts = airlock.Facts(
        epsilon=1.2345678901234567 if known.proposal.plan.record else None,  # a number of the usual length
        rows=data.rows,
        train_rows=data.train_rows,
        test_rows=data.test_rows,
        witness=seals.sign(visits.key, "witness", visit.witnessed()),
        head=head,
        metric_key=secrets.token_bytes(32),
    )
    try:
        entry.mkdir(mode=0o700, exist_ok=True)
        store.write_bytes(entry / "payload.safetensors", cast)
        store.write_text(entry / "head.json", visit.model_dump_json())
        key = secrets.token_hex(32) if known.proposal.plan.record else None
        visits.workshop.ask(op="visit", entry=str(entry), out=str(out), key=key, memory=None)
        airlock.admit(out, outbox, visit, known.proposal.leaves, visits.config.policy, facts)
    finally:
        shutil.rmtree(entry, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)


def _cast(plan: Plan) -> bytes:
    recipe, strategy = build(plan.recipe, Recipe), strategy_of(plan)
    cast = strategy.broadcast(strategy.init(recipes.initial(recipe, plan.seed)))
    return b"".join(store.safetensors(tree.flatten(cast)))


def _peak_mb(pid: int | None) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration, ValueError):
        return None
