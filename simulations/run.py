"""A whole study without a network: the same plan, recipe, draws, strategy and accounting as the deployment."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedtailor import recipe as recipes
from fedtailor import seeds, tree
from fedtailor.baseline import train_alone
from fedtailor.batches import choices, draw, pack
from fedtailor.config import build
from fedtailor.errors import ConfigError, ContractError, RefusedError
from fedtailor.policy import Policy
from fedtailor.privacy.accounting import Charge, epsilon
from fedtailor.privacy.planning import resolve, strategy_of
from fedtailor.privacy.site_accounting import epsilon_after
from fedtailor.recipe import Dataset, Metrics, Recipe
from fedtailor.result import Kind, Result, SiteResult, Timing, model_file, privacy_result, versions, weighted
from fedtailor.simulations.buffered import Clock, buffered_round, steps_within
from fedtailor.simulations.engine import simulate_round
from fedtailor.simulations.policies import Gate, admit
from fedtailor.simulations.traffic import counting, received
from fedtailor.sources import DataSource
from fedtailor.strategy import Strategy, model_in
from fedtailor.study import Plan
from fedtailor.training import clipped, local_train, plain
from fedtailor.tree import Params, Tree

OnEvent = Callable[[dict[str, Any]], None]


def simulate(
    plan: Plan,
    sources: Mapping[str, DataSource],
    *,
    block: int = 64,
    policies: Mapping[str, Policy] | None = None,
    step_s: Mapping[str, float] | None = None,
    on_event: OnEvent = lambda event: None,
) -> tuple[Result, Params]:
    """Run ``plan`` with one client a site.

    Without privacy the parameters equal the deployment's to floating-point tolerance. With privacy the accounting is
    the deployment's, but noise and samples come from seeded generators: for studying accuracy, not for release.

    Args:
        policies: each site's rules; None: nobody asks them. With rules, what they refuse does not take part, and what
            leaves passes the same list as in a deployment.
        step_s: virtual seconds of a local step, by site, 1 where nothing is said: for plans whose rounds do not wait for
            everybody, or give a site only so much time.

    Raises:
        RefusedError: if the rules leave fewer sites than the quorum.
        ConfigError: if a site of the plan has no source.
        ContractError: if its data do not satisfy the contract.
    """
    began = time.monotonic()
    plan = resolve(plan)
    strategy = strategy_of(plan)  # of all its sites: a deployment divides by them too, whoever agrees
    gate = None if policies is None else admit(plan, policies)
    whole, plan = plan, plan if gate is None else gate.plan
    recipe = build(plan.recipe, Recipe)
    data = prepared(plan, recipe, sources)
    start = recipes.initial(recipe, plan.seed)
    losses = recipes.losses(recipe)
    gradient = plain(losses) if plan.record is None else clipped(losses, plan.record.clip)
    train = local_train(gradient, strategy, plan.local.lr, losses if plan.record is None else None)
    state = strategy.init(start)
    memory = tree.stack([strategy.remember(start) for _ in plan.sites])
    like = strategy.start(strategy.broadcast(state), strategy.remember(start))
    counts = torch.tensor([float(len(data[site].train.y)) for site in plan.sites])
    speeds = torch.tensor([(step_s or {}).get(site, 1.0) for site in plan.sites])
    taken, clock = steps_within(plan, speeds), Clock(0.0)
    live = (torch.arange(plan.local.steps) < taken[:, None]).float()
    history: list[dict[str, Any]] = []
    stale: list[dict[str, Any]] = []

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
        batches = batches_of(now, data, round, like)
        given = (strategy, train, state, tree.at(memory, at), batches, live[at], counts[at], round)
        if plan.buffer is None:
            state, kept = simulate_round(*given, block=block, keep=keep)
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
        dropped=stale + ([] if gate is None else gate.dropped),
        history=[h | {"metrics": weighted(h["sites"], rows)} for h in history],
    )
    return result, params


def _put(at: Tensor, old: Tensor, new: Tensor) -> Tensor:
    return old.index_copy(0, at, new)


def _left(gate: Gate, measured: Mapping[str, Metrics], data: Mapping[str, Dataset], which: int) -> dict[str, Metrics]:
    """The metrics that leave their sites."""
    left = {site: gate.metrics(site, metrics, len(data[site].test.y), which) for site, metrics in measured.items()}
    return {site: metrics for site, metrics in left.items() if metrics is not None}


def prepared(plan: Plan, recipe: Recipe, sources: Mapping[str, DataSource]) -> dict[str, Dataset]:
    """Every site's data, prepared; an error names the site."""
    found = {}
    for site in plan.sites:
        if site not in sources:
            raise ConfigError(f"sites: there is no data for {site!r}; there is for {', '.join(sorted(sources))}")
        try:
            found[site] = recipe.prepare(sources[site].table())
        except ContractError as error:
            raise ContractError(f"{site}: {error}") from error
    return found


def batches_of(plan: Plan, data: Mapping[str, Dataset], round: int, like: Tree) -> Tree:
    """One round's batches of every site, stacked: leaves ``[K, S, ...]``, padded to the largest.

    Args:
        like: what is trained, for the shapes of its noise.
    """
    masks = {site: draw(plan.local, len(data[site].train.y), plan.seed, round, site) for site in plan.sites}
    width = max(1, max(int(mask.sum(1).max()) for mask in masks.values()))
    packed = [
        pack(data[site].train, masks[site], plan.local.rate, width) | {"seed": choices(plan, round, site)}
        for site in plan.sites
    ]
    if plan.record is not None and plan.record.noise_multiplier is not None:
        std = plan.record.noise_multiplier * plan.record.clip
        for site, batch in zip(plan.sites, packed, strict=True):
            steps = [_noise(like, std, plan.seed, round, site, step) for step in range(plan.local.steps)]
            batch["noise"] = tree.stack(steps)
    return tree.stack(packed)


def _noise(like: Tree, std: float, seed: int, round: int, site: str, step: int) -> Tree:
    """Seeded noise, for simulations only."""
    rng = seeds.generator(seed, "noise", round, site, step)
    return tree.map(lambda p: std * torch.randn(p.shape, generator=rng, dtype=p.dtype), like)


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
