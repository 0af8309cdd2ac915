"""The life of one run of a study on the server: a folder, a checkpoint after every round, a result at the end.

A run survives ``kill -9`` at any point: the checkpoint holds everything that the next round needs, and sites answer a
repeated round from what they stored, so no round counts twice and no privacy is spent twice.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fedtailor.events import Events
from fedtailor.report import write_run
from fedtailor.result import Result, SiteResult, Timing, Transport, model_file, privacy_result, versions, weighted
from pydantic import ValidationError
from safetensors.torch import save

from fedtailor import recipe as recipes
from fedtailor import store, tree, wire
from fedtailor.config import build
from fedtailor.errors import ConfigError, FedtailorError, StoreError
from fedtailor.recipe import Metrics, Recipe
from fedtailor.server.listener import Bell
from fedtailor.server.rounds import Answer, Closed, answers, close_round
from fedtailor.server.superlink import SuperLink
from fedtailor.strategy import Strategy, model_in
from fedtailor.study import Plan
from fedtailor.tree import Tree
from fedtailor.wire import Visit

DONE = ("completed", "stopped", "failed")


class Status(NamedTuple):
    """What ``fedtailor server runs`` shows of a run."""

    run: str
    study: str
    status: str  # queued, running, completed, stopped, failed
    round: int  # rounds closed
    rounds: int
    detail: str = ""


class Progress(NamedTuple):
    """Everything a run carries from round to round, beside the strategy's state."""

    round: int = 0  # rounds closed
    history: tuple[dict[str, Any], ...] = ()  # per evaluated round: {"round", "sites": {name: metrics}}
    dropped: tuple[dict[str, Any], ...] = ()  # {"round", "site", "code"}
    round_s: tuple[float, ...] = ()
    work_s: tuple[float, ...] = ()  # the slowest site's own work in each round
    wall_s: float = 0.0
    sites: dict[str, dict[str, Any]] = {}  # name -> rows, epsilon, bytes, baseline


class Run:
    """One run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name

    @classmethod
    def create(cls, studies: Path, plan: Plan, config_yaml: str) -> "Run":
        """Queue a plan under a new name."""
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        folder = studies / f"{plan.study}-{stamp}-{plan.digest()[:4]}"
        for suffix in range(1, 1000):
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:
                folder = folder.with_name(f"{plan.study}-{stamp}-{plan.digest()[:4]}-{suffix}")
        run = cls(folder)
        store.write_text(folder / "plan.json", plan.canonical())
        store.write_text(folder / "config.yaml", config_yaml)
        run.write_status("queued", 0)
        return run

    def plan(self) -> Plan:
        """The run's plan."""
        try:
            return Plan.parse((self.folder / "plan.json").read_text())
        except (OSError, ValueError, ValidationError) as error:
            raise StoreError(f"{self.folder / 'plan.json'} cannot be read: {error}") from error

    def status(self) -> Status:
        """What is known of the run."""
        plan = self.plan()
        try:
            raw = json.loads((self.folder / "status.json").read_text())
        except (OSError, ValueError):
            raw = {"status": "failed", "round": 0, "detail": "status.json cannot be read"}
        return Status(self.name, plan.study, raw["status"], raw["round"], plan.rounds, raw.get("detail", ""))

    def ended(self) -> bool:
        """Whether the run is over, for better or worse."""
        try:
            return json.loads((self.folder / "status.json").read_text())["status"] in DONE
        except (OSError, ValueError, KeyError):
            return False

    def write_status(self, status: str, round: int, detail: str = "") -> None:
        """Record the state of the run, atomically."""
        store.write_json(self.folder / "status.json", {"status": status, "round": round, "detail": detail})

    def save(self, state: Tree, progress: Progress, digest: str) -> None:
        """Write the checkpoint: one file, all or nothing."""
        meta = {"progress": json.dumps(progress._asdict()), "plan_sha256": digest}
        store.save_tree(self.folder / "checkpoint.safetensors", {"state": state}, meta)

    def load(self, digest: str) -> tuple[Tree, Progress] | None:
        """The last checkpoint, or None where there is none yet.

        Raises:
            StoreError: if it is damaged or belongs to another plan.
        """
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return None
        loaded, meta = store.load_tree(path)
        if meta.get("plan_sha256") != digest:
            raise StoreError(f"{path} belongs to another plan than plan.json; restore the one that fits or start anew")
        return loaded["state"], Progress(**json.loads(meta["progress"]))


class Setting(NamedTuple):
    """What a run is executed with."""

    superlink: SuperLink
    bell: Bell
    transport: dict[str, bool]
    stop: threading.Event  # a person asked to end the study; what is learnt so far is kept
    halt: threading.Event  # the process is ending; the run resumes when it starts again
    watch: Callable[[dict[str, Any]], None]  # is told every event


def execute(run: Run, setting: Setting) -> None:
    """Run a study from its last checkpoint to its end, and write the result. Never raises: a run fails by status."""
    progress = Progress()
    events = Events(run.folder / "events.jsonl", [setting.watch])
    try:
        progress = _execute(run, setting, events)
    except Exception as error:  # whatever it was, the run ends with a readable word and the coordinator goes on
        detail = str(error) if isinstance(error, FedtailorError) else f"{type(error).__name__}: {error}"
        events.emit("finished", run=run.name, status="failed", detail=detail)
        run.write_status("failed", run.status().round, detail)


def _execute(run: Run, setting: Setting, events: Events) -> Progress:
    began, plan = time.monotonic(), run.plan()
    recipe, strategy = build(plan.recipe, Recipe), build(plan.strategy, Strategy)
    start = recipes.initial(recipe, plan.seed)
    state, progress = run.load(plan.digest()) or (strategy.init(start), Progress())
    events.emit("started", run=run.name, study=plan.study, round=progress.round, rounds=plan.rounds)
    run.write_status("running", progress.round)
    tour = _Tour(run, plan, strategy, wire.summand_spec(plan, strategy, start), setting, events)
    setup_s, before = time.monotonic() - began, progress.wall_s
    try:
        while progress.round < plan.rounds and not setting.stop.is_set() and not setting.halt.is_set():
            closed, seconds = tour.visit(state, progress.round, train=True)
            if setting.stop.is_set() or setting.halt.is_set():
                break  # an interrupted round does not count
            progress = _noted(progress, plan, closed, progress.round, seconds)
            if closed.acc is None or len(closed.reports) < plan.quorum:
                raise ConfigError(_no_quorum(plan, progress.round, closed), code="quorum")
            state = strategy.apply(state, strategy.reduce.done(closed.acc), progress.round)
            del closed
            progress = progress._replace(round=progress.round + 1, wall_s=before + time.monotonic() - began)
            run.save(state, progress, plan.digest())
            run.write_status("running", progress.round)
            events.emit("round", run=run.name, round=progress.round, rounds=plan.rounds, seconds=seconds)
        if setting.halt.is_set():
            run.write_status("queued", progress.round, "interrupted; it resumes when the coordinator starts again")
            return progress
        closed, _ = tour.visit(state, progress.round, train=False)
        progress = _noted(progress, plan, closed, progress.round, None)
    finally:
        tour.close()
    if setting.halt.is_set():
        run.write_status("queued", progress.round, "interrupted; it resumes when the coordinator starts again")
        return progress
    status = "completed" if progress.round == plan.rounds else "stopped"
    params = model_in(strategy.broadcast(state))
    progress = progress._replace(wall_s=before + time.monotonic() - began)
    result = result_of(plan, progress, params, status=status, setup_s=setup_s, transport=setting.transport)
    config_yaml = (run.folder / "config.yaml").read_text()
    write_run(run.folder, result=result, plan=plan, params=params, config_yaml=config_yaml)
    run.write_status(status, progress.round)
    events.emit("finished", run=run.name, status=status, round=progress.round)
    return progress


class _Tour:
    """Visits to all sites of one run, over one Flower run."""

    def __init__(
        self, run: Run, plan: Plan, strategy: Strategy, spec: wire.Spec, setting: Setting, events: Events
    ) -> None:
        self.run, self.plan, self.strategy, self.spec = run, plan, strategy, spec
        self.setting, self.events = setting, events
        self.flower_run, self.task = setting.superlink.open_run()
        self.spool = run.folder / "spool"
        self.spool.mkdir(exist_ok=True)
        self.ticked = 0.0

    def visit(self, state: Tree, round: int, *, train: bool) -> tuple[Closed, float]:
        """Ask every site once; returns what came and the seconds it took."""
        began, plan, setting = time.monotonic(), self.plan, self.setting
        cast = tree.flatten(self.strategy.broadcast(state))
        visit = Visit(
            run=self.run.name,
            round=round,
            train=train,
            evaluate=not train or round % plan.evaluation.every == 0,
            baseline=not train and plan.evaluation.baseline,
            plan=plan.canonical(),
            cast_sha256=hashlib.sha256(save(cast)).hexdigest(),
        )
        sent: dict[str, int] = {}

        def push(nodes: list[int], ttl: float) -> dict[int, str]:
            payload = save(cast)  # made anew each time: held for the whole round it would cost a copy of the model
            ids = setting.superlink.push(self.flower_run, wire.record(visit, payload), nodes, ttl)
            setting.bell.ring()
            for name, node in setting.superlink.nodes().items():
                if node.node_id in ids:
                    sent[name] = sent.get(name, 0) + len(payload)
            return ids

        stream = answers(
            setting.superlink,
            self.flower_run,
            push,
            plan.sites,
            deadline_s=plan.deadline_s,
            limit=wire.size_limit(self.spec),
            spool=self.spool,
            tick=self._tick,
            bell=setting.bell,
            stop=_Either(setting.halt, setting.stop if train else setting.halt),
        )
        closed = close_round(self.strategy, visit, self.spec, stream, lambda answer: self._note(answer, round))
        return closed._replace(sent=sent), time.monotonic() - began

    def _note(self, answer: Answer, round: int) -> None:
        seconds = answer.report.seconds if answer.report else None
        self.events.emit(
            "reply",
            run=self.run.name,
            round=round,
            site=answer.site,
            code=answer.code,
            bytes=answer.size,
            seconds=seconds,
        )

    def _tick(self) -> None:
        if time.monotonic() - self.ticked > 5:
            self.ticked = time.monotonic()
            self.setting.superlink.keep_alive(self.task)

    def close(self) -> None:
        """End the Flower run and delete what is left of its messages."""
        self.setting.superlink.close_run(self.flower_run, self.task)


class _Either:
    """Set when either event is."""

    def __init__(self, a: threading.Event, b: threading.Event) -> None:
        self.a, self.b = a, b

    def is_set(self) -> bool:
        return self.a.is_set() or self.b.is_set()


def _no_quorum(plan: Plan, round: int, closed: Closed) -> str:
    missing = ", ".join(f"{site}: {code}" for site, code in sorted(closed.dropped.items()))
    return f"round {round}: {len(closed.reports)} of {len(plan.sites)} sites replied, the quorum is {plan.quorum} ({missing})"


def _noted(progress: Progress, plan: Plan, closed: Closed, round: int, seconds: float | None) -> Progress:
    """Add what a visit brought to the run's record. ``seconds``: of a round that trained."""
    sites = {name: dict(known) for name, known in progress.sites.items()}
    for name, report in closed.reports.items():
        site = sites.setdefault(name, {"bytes_sent": 0, "bytes_received": 0})
        site |= {"rows": report.rows, "train_rows": report.train_rows, "epsilon": report.epsilon}
        site["bytes_sent"] += closed.received[name]
        if report.baseline is not None:
            site["baseline"] = report.baseline
    for name, size in closed.sent.items():
        sites.setdefault(name, {"bytes_sent": 0, "bytes_received": 0})["bytes_received"] += size
    metrics = {name: report.metrics for name, report in sorted(closed.reports.items()) if report.metrics is not None}
    history = [*progress.history, {"round": round, "sites": metrics}] if metrics else progress.history
    dropped = [{"round": round, "site": site, "code": code} for site, code in sorted(closed.dropped.items())]
    work = max((report.seconds for report in closed.reports.values()), default=0.0)
    timed = [] if seconds is None else [seconds]
    return progress._replace(
        sites=sites,
        history=tuple(history),
        dropped=(*progress.dropped, *dropped),
        round_s=(*progress.round_s, *timed),
        work_s=(*progress.work_s, *([work] if timed else [])),
    )


def result_of(
    plan: Plan, progress: Progress, params: Tree, *, status: str, setup_s: float, transport: dict[str, bool]
) -> Result:
    """The result of a run, from its record. A site that never replied is in ``dropped`` only."""
    final: dict[str, Metrics] = progress.history[-1]["sites"] if progress.history else {}
    known = {name: site for name, site in progress.sites.items() if "rows" in site}
    rows = {name: int(site["train_rows"]) for name, site in known.items()}
    alone = {name: site["baseline"] for name, site in known.items() if "baseline" in site}
    sites = {
        name: SiteResult(
            rows=site["rows"],
            metrics={"local_only": alone.get(name, {}), "federated": final.get(name, {})},
            epsilon=site["epsilon"],
            bytes_sent=site["bytes_sent"],
            bytes_received=site["bytes_received"],
        )
        for name, site in known.items()
    }
    spent = [site["epsilon"] for site in known.values() if site["epsilon"] is not None]
    return Result(
        study=plan.study,
        strategy=plan.strategy.target.rpartition(".")[2],
        rounds=progress.round,
        sites=sites,
        metrics={"local_only": weighted(alone, rows), "federated": weighted(final, rows)},
        privacy=None if plan.privacy is None else privacy_result(plan.privacy, max(spent, default=0.0)),
        timing=Timing(
            wall_s=progress.wall_s, setup_s=setup_s, round_s=list(progress.round_s), work_s=list(progress.work_s)
        ),
        transport=Transport(**transport),
        engine="flower",
        seed=plan.seed,
        model=model_file(params),
        versions=versions(),
        status=status,
        dropped=list(progress.dropped),
        history=[
            {"round": h["round"], "sites": h["sites"], "metrics": weighted(h["sites"], rows)} for h in progress.history
        ],
    )
