"""The life of one run of a study on the server: a visit to all sites a round, a checkpoint after it, a result at the end.

A run survives ``kill -9`` at any point: the checkpoint holds everything that the next round needs, and sites answer a
repeated round from what they stored, so no round counts twice and no privacy is spent twice.
"""

import errno
import hashlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from fedtailor import recipe as recipes
from fedtailor import store, tree, wire
from fedtailor.config import build
from fedtailor.errors import FedtailorError, StoreError
from fedtailor.events import Events
from fedtailor.recipe import Recipe
from fedtailor.report import write_run
from fedtailor.result import Ending
from fedtailor.server.listener import Bell
from fedtailor.server.record import Progress, noted, result_of
from fedtailor.server.rounds import Answer, Closed, advance, answers, close_round
from fedtailor.server.runs import Run
from fedtailor.server.superlink import SuperLink
from fedtailor.strategy import Strategy, model_in
from fedtailor.study import Plan
from fedtailor.tree import Tree
from fedtailor.wire import Visit

log = logging.getLogger("fedtailor.server")
RETRY_S = 5.0  # between attempts to write how a run failed


class Setting(NamedTuple):
    """What a run is executed with."""

    superlink: SuperLink
    bell: Bell
    transport: dict[str, bool]
    stop: threading.Event  # a person asked to end the study; what is learnt so far is kept
    halt: threading.Event  # the process is ending; the run resumes when it starts again
    watch: Callable[[dict[str, Any]], None]  # is told every event


def execute(run: Run, setting: Setting) -> None:
    """Run a study from its last checkpoint to its end, and write the result. Never raises: a run fails by status.

    A failed run keeps its last checkpoint, and its sites keep their answers: once what failed it is mended, it is taken
    up again where it was (``fedtailor server submit --resume``).
    """
    events = Events(run.folder / "events.jsonl", [setting.watch])
    try:
        _execute(run, setting, events)
    except Exception as error:  # whatever it was, the run ends with a readable word and the coordinator goes on
        detail = _readable(error)
        log.error("%s failed: %s", run.name, detail, exc_info=not isinstance(error, FedtailorError | OSError))
        events.emit("finished", run=run.name, status="failed", detail=detail)
        while True:
            try:
                run.write_status("failed", run.status().round, detail)
                return
            except StoreError as also:  # no other run could do better: wait until there is room
                log.error("%s; trying again in %.0f s", also, RETRY_S)
            if setting.halt.wait(RETRY_S):  # it stays as it was, and resumes when the coordinator starts again
                return


def _readable(error: Exception) -> str:
    if isinstance(error, FedtailorError):
        return str(error)
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, OSError) and error.errno == errno.ENOSPC or "disk is full" in first:
        return f"the coordinator's disk is full ({first}); make room, then take the run up again: submit --resume"
    return f"{type(error).__name__}: {first}"


def _execute(run: Run, setting: Setting, events: Events) -> Progress:
    began, plan = time.monotonic(), run.plan()
    recipe, strategy = build(plan.recipe, Recipe), build(plan.strategy, Strategy)
    start = recipes.initial(recipe, plan.seed)
    if (known := run.load(plan.digest())) is None:
        known = strategy.init(start), Progress()
        run.save(*known, plan.digest())
    progress, like = known[1], wire.summand(plan, strategy, start)
    del start, known  # between rounds the state lies in the checkpoint only: in memory it would be a copy of the model
    events.emit("started", run=run.name, study=plan.study, round=progress.round, rounds=plan.rounds)
    run.write_status("running", progress.round)
    tour = _Tour(run, plan, strategy, like, setting, events)
    setup_s, before = time.monotonic() - began, progress.wall_s
    try:
        while progress.round < plan.rounds and not setting.stop.is_set() and not setting.halt.is_set():
            closed, seconds = tour.visit(progress.round, train=True)
            if setting.stop.is_set() or setting.halt.is_set():
                break  # an interrupted round does not count
            progress = noted(progress, plan, closed, progress.round, seconds)
            state = advance(plan, strategy, tour.state, closed, progress.round, like)
            progress = progress._replace(round=progress.round + 1, wall_s=before + time.monotonic() - began)
            run.save(state, progress, plan.digest())
            del closed, state
            run.write_status("running", progress.round)
            events.emit("round", run=run.name, round=progress.round, rounds=plan.rounds, seconds=seconds)
        if setting.halt.is_set():
            run.write_status("queued", progress.round, "interrupted; it resumes when the coordinator starts again")
            return progress
        closed, _ = tour.visit(progress.round, train=False)
        progress = noted(progress, plan, closed, progress.round, None)
    finally:
        tour.close()
    if setting.halt.is_set():
        run.write_status("queued", progress.round, "interrupted; it resumes when the coordinator starts again")
        return progress
    status: Ending = "completed" if progress.round == plan.rounds else "stopped"
    params = model_in(strategy.broadcast(tour.state()))
    progress = progress._replace(wall_s=before + time.monotonic() - began)
    result = result_of(plan, progress, params, status=status, setup_s=setup_s, transport=setting.transport)
    config_yaml = (run.folder / "config.yaml").read_text()
    write_run(run.folder, result=result, plan=plan, params=params, config_yaml=config_yaml)
    events.emit("finished", run=run.name, status=status, round=progress.round)
    run.write_status(status, progress.round)  # last: who watches takes it for the end of the events
    return progress


class _Tour:
    """Visits to all sites of one run, over one Flower run."""

    def __init__(self, run: Run, plan: Plan, strategy: Strategy, like: Tree, setting: Setting, events: Events) -> None:
        self.run, self.plan, self.strategy = run, plan, strategy
        self.spec = wire.spec_of(like)
        self.setting, self.events = setting, events
        self.flower_run, self.task = setting.superlink.open_run()
        self.spool = run.folder / "spool"
        self.spool.mkdir(exist_ok=True)
        self.ticked = 0.0

    def state(self) -> Tree:
        """The strategy's state after the last closed round."""
        known = self.run.load(self.plan.digest())
        assert known is not None
        return known[0]

    def _cast(self) -> bytes:
        return b"".join(store.safetensors(tree.flatten(self.strategy.broadcast(self.state()))))

    def visit(self, round: int, *, train: bool) -> tuple[Closed, float]:
        """Ask every site once; returns what came and the seconds it took."""
        began, plan, setting = time.monotonic(), self.plan, self.setting
        made = [self._cast()]  # for the first push; whoever joins later is sent it made anew
        visit = Visit(
            run=self.run.name,
            round=round,
            train=train,
            evaluate=not train or round % plan.evaluation.every == 0,
            baseline=not train and plan.evaluation.baseline,
            plan=plan.canonical(),
            cast_sha256=hashlib.sha256(made[0]).hexdigest(),
        )
        sent: dict[str, int] = {}
        head = len(visit.model_dump_json())

        def push(nodes: list[int], ttl: float) -> dict[int, str]:
            payload = made.pop() if made else self._cast()
            ids = setting.superlink.push(self.flower_run, wire.record(visit, payload), nodes, ttl)
            setting.bell.ring()
            for name, node in setting.superlink.nodes().items():
                if node.node_id in ids:
                    sent[name] = sent.get(name, 0) + len(payload) + head
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
