"""A whole study without a network: the same plan, recipe, draws, strategy and accounting as the deployment."""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedtailor import tree
from fedtailor.config import BlockPath, Precision, Rows, Steps
from fedtailor.errors import RefusedError
from fedtailor.policy import Policy
from fedtailor.population import Population
from fedtailor.result import Result
from fedtailor.simulations import standing
from fedtailor.simulations.arrivals import each, folded
from fedtailor.simulations.buffered import buffered_round
from fedtailor.simulations.cohort import rows_of
from fedtailor.simulations.conclusion import concluded, measured
from fedtailor.simulations.crew import ALL, crew
from fedtailor.simulations.engine import in_blocks, simulate_round
from fedtailor.simulations.hardware import HOST, across
from fedtailor.simulations.precision import multiplied
from fedtailor.simulations.ray_crew import LOCAL, ray_crew
from fedtailor.simulations.setting import OnEvent, Setting, prepare
from fedtailor.simulations.standing import Standing
from fedtailor.sources import DataSource
from fedtailor.strategy import standing as standing_still
from fedtailor.study import Plan
from fedtailor.tree import Params, Tree


def simulate(
    plan: Plan,
    sources: Mapping[str, DataSource],
    *,
    block: int = 64,
    path: BlockPath = "auto",
    policies: Mapping[str, Policy] | None = None,
    step_s: Mapping[str, float] | None = None,
    population: Population | None = None,
    workers: int = 1,
    device: str = "cpu",
    rows: Rows = "auto",
    precision: Precision = "float32",
    steps: Steps = "plain",
    ray: str | None = None,
    gpus: float = 0.0,
    checkpoint: Path | None = None,
    every_s: float = 60.0,
    resume: bool = False,
    on_event: OnEvent = lambda event: None,
) -> tuple[Result, Params]:
    """Run ``plan`` with one client a site, or with a population of virtual clients.

    Without privacy the parameters equal the deployment's to floating-point tolerance. With privacy the accounting is
    the deployment's, but noise and samples come from seeded generators: for studying accuracy, not for release.

    A site without a row to train on takes no part.

    Args:
        block: clients trained at once, at most; fewer where memory or a processor's cache asks for it.
        path: how a block is trained; an event of kind ``path`` says which way was taken, and why.
        policies: each site's rules; None: nobody asks them. With rules, what they refuse does not take part, and what
            leaves passes the same list as in a deployment.
        step_s: virtual seconds of a local step, by site, 1 where nothing is said: for plans whose rounds do not wait for
            everybody, or give a site only so much time.
        population: deals all sites' training rows out to more clients, of whom a round asks some, at random. Metrics stay
            those of the sites' held-out parts. What a round costs follows from its cohort, not from the population.
        workers: processes that train the clients, each its share, if it is more than one. Each has all rows in memory.
        device: that clients are trained on, see :func:`fedtailor.simulations.hardware.device_of`.
        rows: where training rows lie, see :func:`fedtailor.simulations.hardware.home_of_rows`.
        precision: how exactly models multiply, see :mod:`fedtailor.simulations.precision`.
        steps: how a block's are done: see :mod:`fedtailor.simulations.compiled` and :mod:`fedtailor.simulations.graphs`.
        ray: ``local``, or a Ray cluster's address: Ray places the workers, one too. Each asks it for as many CPUs as torch
            has threads here, of which those on this machine get their share each.
        gpus: what each of these asks for beside.
        checkpoint: where to write how far the study is, at most every ``every_s`` seconds.
        resume: go on from ``checkpoint``, where there is one: the result is then the same bit for bit, on this machine
            and unless ``path`` is ``measure``, which asks the clock.

    Raises:
        RefusedError: if the rules or the data leave fewer sites than the quorum.
        ConfigError: if a site of the plan has no source, the model cannot be trained as ``path`` says, there is no such
            ``device``, its ``precision`` is too low for the plan's privacy, or the checkpoint is of another study.
        ConnectionFailed: if there is no Ray cluster.
        ContractError: if its data do not satisfy the contract.
        StoreError: if the checkpoint cannot be read or written.
    """
    began, before_s = time.monotonic(), 0.0
    how: dict[str, Any] = {
        "block": block,
        "path": path,
        "policies": policies,
        "step_s": step_s,
        "population": population,
        "device": device,
        "rows": rows,
        "precision": precision,
        "steps": steps,
    }
    with multiplied(precision, plan.record is not None):
        study = prepare(plan, sources, **how, on_event=on_event)
    prints = [one.fingerprint for one in study.data.values()] + list(study.clients.prints)
    parts = workers if ray is None else f"{workers} of Ray"  # sums of other parts are rounded otherwise
    digest = standing.digest_of(study.whole.canonical(), study.plan.sites, prints, how, parts)
    at = study.begin()
    if resume and checkpoint is not None and checkpoint.exists():
        at, also = standing.load(checkpoint, digest)
        at = study.resumed(at)
        study.sent.update(also["sent"])
        before_s = also["wall_s"]
        if study.gate is not None:
            study.gate.dropped[:] = also["dropped"]
        on_event({"kind": "round", "round": at.round, "rounds": plan.rounds})
    with ExitStack() as stack:
        stack.enter_context(multiplied(precision, plan.record is not None))
        if workers > 1 or ray is not None:
            threads = max(1, torch.get_num_threads() // (workers if ray in (None, LOCAL) else 1))
            given = workers, study.duty(threads), rows_of(study.data)
            many = stack.enter_context(crew(*given) if ray is None else ray_crew(*given, ray, gpus)).many
            study = study._replace(way=study.way._replace(many=across(many, HOST, study.home), block=ALL))
            at = replace(at, block=ALL)
        setup_s = saved = time.monotonic() - began
        while at.round < plan.rounds:
            at = advanced(study, at, on_event)
            if checkpoint is not None and time.monotonic() - began - saved >= every_s:
                gone = [] if study.gate is None else study.gate.dropped
                also = {"sent": study.sent, "dropped": gone, "wall_s": before_s + time.monotonic() - began}
                standing.save(checkpoint, at, also, digest)
                saved = time.monotonic() - began
            done = {"round": at.round, "clients": at.trained, "seconds": at.round_s[-1]}
            on_event({"kind": "round", "rounds": plan.rounds} | done)
        return concluded(study, at, began - before_s, setup_s)


def advanced(study: Setting, at: Standing, on_event: OnEvent) -> Standing:
    """One round further."""
    began, round, strategy, gate, block = time.monotonic(), at.round, study.strategy, study.gate, at.block
    now, history, stale = study.turn(round), list(at.history), list(at.stale)
    if round % study.plan.evaluation.every == 0:
        shown = {site: study.data[site] for site in now.sites}
        history.append({"round": round, "sites": measured(study.recipe, strategy, at.state, shown, study.device)})
    if len(now.sites) < study.plan.quorum:
        raise RefusedError(f"round {round}: {len(now.sites)} sites take part whose turn it is", code="quorum")

    def smaller(size: int) -> None:
        nonlocal block
        block = size
        on_event({"kind": "path", "path": study.way.path, "block": size, "why": "out of memory", "seconds": {}})

    clock, state, memory, known = at.clock, at.state, at.memory, at.known
    flow = None if study.clients.flow is None else study.clients.flow(round, clock)
    asked = study.clients.asked(round, clock.now) if flow is None else flow.begun
    memory, known, rows = recalled(memory, known, asked, tree.bare(strategy.remember(study.start)))
    if flow is not None and flow.came:
        fresh = dict[int, Tree]()
        if asked:
            told = (strategy.broadcast(state), tree.at(memory, rows), *study.clients.fed(round, asked))
            fresh, mem = each(asked, in_blocks(study.way.many, *told, block, smaller))
            memory = tree.map(partial(_put, rows), memory, tree.bare(mem))
        state, clock, old = folded(study.plan, strategy, state, round, flow, fresh)
        stale += old
    elif flow is None and asked:
        given = (strategy, study.way.many, state, tree.at(memory, rows), *study.clients.fed(round, asked), round)
        if study.plan.buffer is None:
            state, kept = simulate_round(*given, block, study.keep, smaller)
        else:
            state, kept, clock, old = buffered_round(study.plan, *given, clock, study.seconds, study.keep)
            stale += old
        memory = tree.map(partial(_put, rows), memory, tree.bare(kept))
    elif study.plan.site is None:
        raise RefusedError(f"round {round}: nobody answers; ask more clients, or wait longer", code="quorum")
    else:  # a sample that nobody is in: its noise is in the model all the same
        nothing = tree.map(
            lambda x: torch.zeros_like(x)[None], standing_still(strategy, study.start, study.plan.local.lr)
        )
        state = strategy.apply(state, strategy.reduce.done(strategy.reduce.add(None, nothing)), round)
    if gate is not None:
        out = {entry["site"] for entry in gate.dropped} & set(now.sites)
        if len(now.sites) - len(out) < study.plan.quorum:
            raise RefusedError(f"round {round}: too few answers passed the airlock: {gate.dropped}", code="quorum")
    round_s = [*at.round_s, time.monotonic() - began]
    virtual_s = at.virtual_s
    if flow is not None:
        virtual_s = [*virtual_s, clock.now - at.clock.now]
    elif (lasted := study.clients.lasts(round, at.clock.now)) is not None:
        virtual_s, clock = [*virtual_s, lasted], clock._replace(now=clock.now + lasted)
    return Standing(round + 1, state, memory, known, clock, block, stale, history, round_s, virtual_s, len(asked))


def recalled(memory: Tree, known: list[int], asked: list[int], fresh: Tree) -> tuple[Tree, list[int], Tensor]:
    """Memories with those of ``asked`` among them, whose they are, and their rows; who is new has a ``fresh`` one."""
    if not tree.leaves(fresh):
        return memory, known, torch.zeros(len(asked), dtype=torch.long)
    place = {client: row for row, client in enumerate(known)}
    new = [client for client in asked if client not in place]
    if new:
        place |= {client: len(known) + n for n, client in enumerate(new)}
        memory = tree.map(lambda old, one: torch.cat([old, one.expand(len(new), *one.shape)]), memory, fresh)
    return memory, [*known, *new], torch.tensor([place[client] for client in asked], dtype=torch.long)


def _put(at: Tensor, old: Tensor, new: Tensor) -> Tensor:
    return old.index_copy(0, at, new)
