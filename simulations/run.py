"""A whole study without a network: the same plan, recipe, draws, strategy and accounting as the deployment."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedtailor import recipe as recipes
from fedtailor import tree
from fedtailor.baseline import train_alone
from fedtailor.config import BlockPath, build
from fedtailor.errors import RefusedError
from fedtailor.policy import Policy
from fedtailor.privacy.accounting import Charge, epsilon
from fedtailor.privacy.planning import resolve, strategy_of
from fedtailor.privacy.site_accounting import epsilon_after
from fedtailor.recipe import Dataset, Metrics, Recipe
from fedtailor.result import Kind, Result, SiteResult, Timing, model_file, privacy_result, versions, weighted
from fedtailor.simulations.buffered import Clock, buffered_round, steps_within
from fedtailor.simulations.cohort import batches_of, feed_of, prepared, with_rows
from fedtailor.simulations.descent import SMALL
from fedtailor.simulations.engine import simulate_round
from fedtailor.simulations.paths import Round, Task, choose
from fedtailor.simulations.policies import Gate, admit
from fedtailor.simulations.traffic import counting, received
from fedtailor.sources import DataSource
from fedtailor.strategy import Strategy, model_in
from fedtailor.study import Plan
from fedtailor.tree import Params, Tree

OnEvent = Callable[[dict[str, Any]], None]


def simulate(
    plan: Plan,
    sources: Mapping[str, DataSource],
    *,
    block: int = 64,
    path: BlockPath = "auto",
    policies: Mapping[str, Policy] | None = None,
    step_s: Mapping[str, float] | None = None,
    on_event: OnEvent = lambda event: None,
) -> tuple[Result, Params]:
    """Run ``plan`` with one client a site.

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

    Raises:
        RefusedError: if the rules or the data leave fewer sites than the quorum.
        ConfigError: if a site of the plan has no source, or the model cannot be trained as ``path`` says.
        ContractError: if its data do not satisfy the contract.
    """
    began = time.monotonic()
    plan = resolve(plan)
    strategy = strategy_of(plan)  # of all its sites: a deployment divides by them too, whoever agrees
    gate = None if policies is None else admit(plan, policies)
    whole, plan = plan, plan if gate is None else gate.plan
    recipe = build(plan.recipe, Recipe)
    data = prepared(plan, recipe, sources)
    plan, empty = with_rows(plan, data)
    gate = None if gate is None else gate._replace(plan=plan)
    start = recipes.initial(recipe, plan.seed)
    state = strategy.init(start)
    memory = tree.stack([strategy.remember(start) for _ in plan.sites])
    like = strategy.start(strategy.broadcast(state), strategy.remember(start))
    counts = torch.tensor([float(len(data[site].train.y)) for site in plan.sites])
    speeds = torch.tensor([(step_s or {}).get(site, 1.0) for site in plan.sites])
    taken, clock = steps_within(plan, speeds), Clock(0.0)
    live = (torch.arange(plan.local.steps) < taken[:, None]).float()
    history: list[dict[str, Any]] = []
    stale: list[dict[str, Any]] = []
    feed, clip = feed_of(plan, data, like), None if plan.record is None else plan.record.clip
    large = len(plan.sites) * sum(p.numel() for p in start.values()) >= SMALL  # else a sum in one go saves nothing
    together = gate is None and plan.buffer is None and large
    task = Task(recipe, strategy, plan.local.lr, clip, feed, block, together)
    way = choose(path, task, Round(strategy.broadcast(state), memory, batches_of(plan, data, 0), live, counts))
    on_event({"kind": "path", "path": way.path, "block": way.block, "why": way.why, "seconds": way.seconds})

    def smaller(block: int) -> None:
        nonlocal way
        way = way._replace(block=block)
        on_event({"kind": "path", "path": way.path, "block": block, "why": "out of memory", "seconds": {}})

    def turn(round: int) -> Plan:
        return plan.model_copy(update={"sites": tuple(site for site in plan.sites if site in whole.asked(round))})

    def admitted(summands: Tree, first: int, round: int) -> Tensor | None:
        return None if gate is None else gate._replace(plan=turn(round)).keep(summands, first, round)

    keep, sent = counting(plan, strategy, start, admitted, lambda round: turn(round).sites)
    setup_s, round_s = time.monotonic() - began, []
    for round in range(plan.rounds):
        began_round = time.monotonic()
        now = turn(round)
        at = torch.tensor([place for place, site in enumerate(plan.sites) if site in now.sites], dtype=torch.long)
        if round % plan.evaluation.every == 0:
            shown = {site: data[site] for site in now.sites}
            history.append({"round": round, "sites": measured(recipe, strategy, state, shown)})
        if len(now.sites) < plan.quorum:
            raise RefusedError(f"round {round}: {len(now.sites)} sites take part whose turn it is", code="quorum")
        batches = batches_of(now, data, round)
        given = (strategy, way.many, state, tree.at(memory, at), batches, live[at], counts[at], round)
        if plan.buffer is None:
            state, kept = simulate_round(*given, way.block, keep, smaller)
        else:
            state, kept, clock, old = buffered_round(plan, *given, clock, taken * speeds, keep)
            stale += old
        memory = tree.map(partial(_put, at), memory, kept)
        if (
            gate is not None
            and len(now.sites) - len({entry["site"] for entry in gate.dropped} & set(now.sites)) < plan.quorum
        ):
            raise RefusedError(f"round {round}: too few answers passed the airlock: {gate.dropped}", code="quorum")
        round_s.append(time.monotonic() - began_round)
        on_event({"kind": "round", "round": round + 1, "rounds": plan.rounds})
    history.append({"round": plan.rounds, "sites": measured(recipe, strategy, state, data)})
    alone: dict[str, Metrics] = {}
    own = personal(recipe, strategy, state, memory, data)
    if gate is not None:
        own = _left(gate, own, data, -2)
        for past in history:
            past["sites"] = _left(gate, past["sites"], data, past["round"])
    if plan.evaluation.baseline:
        for site in plan.sites:
            params = train_alone(recipe, data[site].train, plan, site)
            alone[site] = recipes.evaluate(recipe, params, data[site].test)
    alone = alone if gate is None else _left(gate, alone, data, -1)
    rows = {site: len(data[site].train.y) for site in plan.sites}
    params = model_in(strategy.broadcast(state))
    spent, cast = _epsilon(plan), received(plan, strategy, state)
    kinds: dict[Kind, Mapping[str, Metrics]] = {"local_only": alone, "federated": history[-1]["sites"]}
    if own:
        kinds["personal"] = own
    result = Result(
        study=plan.study,
        strategy=plan.strategy.target.rpartition(".")[2],
        rounds=plan.rounds,
        sites={
            site: SiteResult(
                rows=data[site].rows,
                metrics={kind: by_site.get(site, {}) for kind, by_site in kinds.items()},
                epsilon=spent,
                bytes_sent=sent[site],
                bytes_received=cast,
            )
            for site in plan.sites
        },
        metrics={kind: weighted(by_site, rows) for kind, by_site in kinds.items()},
        privacy=None if plan.privacy is None or spent is None else privacy_result(plan.privacy, spent),
        timing=Timing(wall_s=time.monotonic() - began, setup_s=setup_s, round_s=round_s),
        transport=None,
        engine="simulation",
        seed=plan.seed,
        model=model_file(params),
        versions=versions(),
        dropped=empty + stale + ([] if gate is None else gate.dropped),
        history=[h | {"metrics": weighted(h["sites"], rows)} for h in history],
    )
    return result, params


def _put(at: Tensor, old: Tensor, new: Tensor) -> Tensor:
    return old.index_copy(0, at, new)


def _left(gate: Gate, measured: Mapping[str, Metrics], data: Mapping[str, Dataset], which: int) -> dict[str, Metrics]:
    """The metrics that leave their sites."""
    left = {site: gate.metrics(site, metrics, len(data[site].test.y), which) for site, metrics in measured.items()}
    return {site: metrics for site, metrics in left.items() if metrics is not None}


def measured(recipe: Recipe, strategy: Strategy, state: Tree, data: Mapping[str, Dataset]) -> dict[str, Metrics]:
    """The current model's metrics at every site."""
    params = model_in(strategy.broadcast(state))
    return {site: recipes.evaluate(recipe, params, one.test) for site, one in data.items()}


def personal(
    recipe: Recipe, strategy: Strategy, state: Tree, memory: Tree, data: Mapping[str, Dataset]
) -> dict[str, Metrics]:
    """The metrics of each site's own model; empty where the strategy gives it none."""
    if strategy.personal is None:
        return {}
    cast = strategy.broadcast(state)
    own = {site: strategy.personal(cast, tree.at(memory, k)) for k, site in enumerate(data)}
    return {site: recipes.evaluate(recipe, own[site], one.test) for site, one in data.items()}


def _epsilon(plan: Plan) -> float | None:
    if plan.site is not None:
        return epsilon_after(plan.site, plan.rounds)
    if plan.record is None or plan.record.noise_multiplier is None:
        return None
    charge = Charge(plan.record.noise_multiplier, plan.local.rate, plan.local.steps)
    return epsilon([charge] * plan.rounds, plan.record.delta)
