"""The life of one run of a study on the server: a visit to all sites a round, a checkpoint after it, a result at the end.

A run survives ``kill -9`` at any point: the checkpoint holds everything that the next round needs, and sites answer a
repeated round from what they stored, so no round counts twice and no privacy is spent twice.
"""

import errno
import logging
import time
from functools import partial

from fedtailor import heap
from fedtailor import recipe as recipes
from fedtailor.config import build
from fedtailor.errors import FedtailorError, StoreError
from fedtailor.events import Events
from fedtailor.privacy.planning import strategy_of
from fedtailor.recipe import Recipe
from fedtailor.report import write_run
from fedtailor.result import Ending
from fedtailor.server import slicewise
from fedtailor.server.folding import advance, counted
from fedtailor.server.listener import Bell
from fedtailor.server.memory import drop_code
from fedtailor.server.noise import forget, noise_key, releasing
from fedtailor.server.record import Progress, noted, result_of
from fedtailor.server.runs import Run
from fedtailor.server.tour import Setting, Tour
from fedtailor.server.vouching import lasts_from
from fedtailor.strategy import model_in
from fedtailor.treefile import TreeFile

log = logging.getLogger("fedtailor.server")
RETRY_S = 5.0  # between attempts to write how a run failed


def execute(run: Run, setting: Setting) -> None:
    """Run a study from its last checkpoint to its end, and write the result. Never raises: a run fails by status.

    A failed run keeps its last checkpoint, and its sites keep their answers: once what failed it is mended, it is taken
    up again where it was (``fedtailor server submit --resume``).
    """
    events = Events(run.folder / "events.jsonl", [setting.watch])
    try:
        _execute(run, setting, events)
    except Exception as error:  # whatever it was, the run ends with a readable word and the coordinator goes on
        _fail(run, setting, events, error)


def propose(run: Run, setting: Setting) -> bool:
    """Show a run's proposal to its sites until it may begin; whether it may. Never raises either."""
    events = Events(run.folder / "events.jsonl", [setting.watch])
    try:
        plan = run.plan()
        tour = Tour(run, plan, strategy_of(plan), setting, events, ear=Bell())
        try:
            agreed = tour.propose()
        finally:
            tour.close()
        if agreed:
            run.agree()
        elif setting.stop.is_set():
            events.emit("finished", run=run.name, status="stopped", detail="stopped before it began")
            run.write_status("stopped", 0, "stopped before it began")
        return agreed
    except Exception as error:
        _fail(run, setting, events, error)
        return False


def _fail(run: Run, setting: Setting, events: Events, error: Exception) -> None:
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
    recipe, strategy = build(plan.recipe, Recipe), strategy_of(plan, noise_key(run, plan))
    if not run.begun():
        run.save(strategy.init(recipes.initial(recipe, plan.seed)), Progress(), plan.digest())
    _, progress = run.checkpoint(plan.digest())  # the state lies there only: in memory it would be a copy of the model
    events.emit("started", run=run.name, study=plan.study, round=progress.round, rounds=plan.rounds)
    run.write_status("running", progress.round)
    heap.trim()
    drop_code()  # what made the first state
    tour = Tour(run, plan, strategy, setting, events)
    like = slicewise.shaped(tour.leaves.spec())
    setup_s, before = time.monotonic() - began, progress.wall_s
    try:
        releasing(run, plan, progress.round)
        while progress.round < plan.rounds and not setting.stop.is_set() and not setting.halt.is_set():
            closed, seconds, last = tour.visit(progress, train=True)
            if setting.stop.is_set() or setting.halt.is_set():
                break  # an interrupted round does not count
            acc, round = counted(plan, closed, progress.round), progress.round
            progress = noted(progress, plan, closed, round, seconds)
            wall_s = before + time.monotonic() - began
            lasts = (*lasts_from(progress.last), last)[-plan.turns() :]
            progress = progress._replace(round=round + 1, wall_s=wall_s, last=lasts)
            if isinstance(acc, TreeFile) and slicewise.can_be(strategy):
                step = partial(slicewise.advance, strategy, acc, round=round, like=like)
                run.step(step, progress, plan.digest())
            else:
                run.save(advance(strategy, tour.state, acc, round, like), progress, plan.digest())
            releasing(run, plan, progress.round)
            del closed, acc
            heap.trim()
            run.write_status("running", progress.round)
            inside, root = sorted(last.witnesses), last.root()
            events.emit("round", run=run.name, round=progress.round, rounds=plan.rounds, seconds=seconds, sites=inside,
                        root=root)  # fmt: skip
        if setting.halt.is_set():
            run.write_status("queued", progress.round, "interrupted; it resumes when the coordinator starts again")
            return progress
        closed, _, _ = tour.visit(progress, train=False)
        progress = noted(progress, plan, closed, progress.round, None)
    finally:
        tour.close()
    if setting.halt.is_set():
        run.write_status("queued", progress.round, "interrupted; it resumes when the coordinator starts again")
        return progress
    drop_code()
    status: Ending = "completed" if progress.round == plan.rounds else "stopped"
    saved, _ = run.checkpoint(plan.digest())
    model = slicewise.cast(strategy, saved, model=True) or model_in(strategy.broadcast(tour.state()))
    progress = progress._replace(wall_s=before + time.monotonic() - began)
    result = result_of(plan, progress, model, status=status, setup_s=setup_s, transport=setting.transport)
    run.note_contributors(progress.inside)
    config_yaml = (run.folder / "config.yaml").read_text()
    write_run(run.folder, result=result, plan=plan, model=model, config_yaml=config_yaml)
    events.emit("finished", run=run.name, status=status, round=progress.round)
    run.write_status(status, progress.round)  # after the events: who watches takes it for their end
    if status == "completed":
        forget(run)  # after the status: until that is written, the run may be taken up again, and needs its key
    return progress
