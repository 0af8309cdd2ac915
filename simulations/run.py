"""A whole study without a network: the same plan, recipe, draws, strategy and accounting as the deployment."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedtailor import recipe as recipes
from fedtailor import seeds, tree
from fedtailor.baseline import train_alone
from fedtailor.batches import choices, draw, numbered
from fedtailor.config import BlockPath, build
from fedtailor.errors import ConfigError, ContractError, RefusedError
from fedtailor.policy import Policy
from fedtailor.privacy.accounting import Charge, epsilon
from fedtailor.privacy.planning import resolve
from fedtailor.recipe import Dataset, Metrics, Part, Recipe
from fedtailor.result import Result, SiteResult, Timing, model_file, privacy_result, versions, weighted
from fedtailor.simulations.descent import SMALL
from fedtailor.simulations.engine import simulate_round
from fedtailor.simulations.feed import Feed, seeded
from fedtailor.simulations.paths import Round, Task, choose
from fedtailor.simulations.policies import Gate, admit
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

    Raises:
        RefusedError: if the rules or the data leave fewer sites than the quorum.
        ConfigError: if a site of the plan has no source, or the model cannot be trained as ``path`` says.
        ContractError: if its data do not satisfy the contract.
    """
    began = time.monotonic()
    plan = resolve(plan)
    gate = None if policies is None else admit(plan, policies)
    plan = plan if gate is None else gate.plan
    recipe, strategy = build(plan.recipe, Recipe), build(plan.strategy, Strategy)
    data = prepared(plan, recipe, sources)
    plan, empty = with_rows(plan, data)
    gate = None if gate is None else gate._replace(plan=plan)
    start = recipes.initial(recipe, plan.seed)
    state = strategy.init(start)
    memory = tree.stack([strategy.remember(start) for _ in plan.sites])
    counts = torch.tensor([float(len(data[site].train.y)) for site in plan.sites])
    live = torch.ones(len(plan.sites), plan.local.steps)
    history: list[dict[str, Any]] = []
    keep: Callable[[Tree, int, int], Tensor | None] = (lambda *_: None) if gate is None else gate.keep
    feed = feed_of(plan, data, start)
    clip = None if plan.privacy is None else plan.privacy.clip
    large = len(plan.sites) * sum(p.numel() for p in start.values()) >= SMALL  # else a sum in one go saves nothing
    task = Task(recipe, strategy, plan.local.lr, clip, feed, block, together=gate is None and large)
    way = choose(path, task, Round(strategy.broadcast(state), memory, batches_of(plan, data, 0), live, counts))
    on_event({"kind": "path", "path": way.path, "block": way.block, "why": way.why, "seconds": way.seconds})

    def smaller(block: int) -> None:
        nonlocal way
        way = way._replace(block=block)
        on_event({"kind": "path", "path": way.path, "block": block, "why": "out of memory", "seconds": {}})

    setup_s, round_s = time.monotonic() - began, []
    for round in range(plan.rounds):
        clock = time.monotonic()
        if round % plan.evaluation.every == 0:
            history.append({"round": round, "sites": measured(recipe, strategy, state, data)})
        batches = batches_of(plan, data, round)
        state, memory = simulate_round(
            strategy, way.many, state, memory, batches, live, counts, round, way.block, keep, smaller
        )
        if (
            gate is not None
            and len(plan.sites) - len({entry["site"] for entry in gate.dropped} & set(plan.sites)) < plan.quorum
        ):
            raise RefusedError(f"round {round}: too few answers passed the airlock: {gate.dropped}", code="quorum")
        round_s.append(time.monotonic() - clock)
        on_event({"kind": "round", "round": round + 1, "rounds": plan.rounds})
    history.append({"round": plan.rounds, "sites": measured(recipe, strategy, state, data)})
    alone: dict[str, Metrics] = {}
    if gate is not None:
        for past in history:
            past["sites"] = _left(gate, past["sites"], data, past["round"])
    if plan.evaluation.baseline:
        for site in plan.sites:
            params = train_alone(recipe, data[site].train, plan, site)
            alone[site] = recipes.evaluate(recipe, params, data[site].test)
    alone = alone if gate is None else _left(gate, alone, data, -1)
    rows = {site: len(data[site].train.y) for site in plan.sites}
    params = model_in(strategy.broadcast(state))
    spent = _epsilon(plan)
    result = Result(
        study=plan.study,
        strategy=plan.strategy.target.rpartition(".")[2],
        rounds=plan.rounds,
        sites={
            site: SiteResult(
                rows=data[site].rows,
                metrics={"local_only": alone.get(site, {}), "federated": history[-1]["sites"].get(site, {})},
                epsilon=spent,
                bytes_sent=0,
                bytes_received=0,
            )
            for site in plan.sites
        },
        metrics={"local_only": weighted(alone, rows), "federated": weighted(history[-1]["sites"], rows)},
        privacy=None if plan.privacy is None or spent is None else privacy_result(plan.privacy, spent),
        timing=Timing(wall_s=time.monotonic() - began, setup_s=setup_s, round_s=round_s),
        transport=None,
        engine="simulation",
        seed=plan.seed,
        model=model_file(params),
        versions=versions(),
        dropped=empty + ([] if gate is None else gate.dropped),
        history=[h | {"metrics": weighted(h["sites"], rows)} for h in history],
    )
    return result, params


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


def with_rows(plan: Plan, data: dict[str, Dataset]) -> tuple[Plan, list[dict[str, Any]]]:
    """The plan and the data of those sites that have a row to train on, and an entry for each of the others.

    Raises:
        RefusedError: code ``quorum``, if too few have any.
    """
    sites = tuple(site for site in plan.sites if len(data[site].train.y))
    without = [site for site in plan.sites if site not in sites]
    if len(sites) < plan.quorum:
        raise RefusedError(
            f"{len(sites)} of {len(plan.sites)} sites have rows, the quorum is {plan.quorum}", code="quorum"
        )
    for site in without:
        del data[site]
    return plan.model_copy(update={"sites": sites}), [{"round": 0, "site": site, "code": "empty"} for site in without]


def feed_of(plan: Plan, data: Mapping[str, Dataset], start: Params) -> Feed:
    """All sites' training rows one after another, and their noise."""
    parts = [data[site].train for site in plan.sites]
    table = Part(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))
    if plan.privacy is None or plan.privacy.noise_multiplier is None:
        return Feed(table)
    return Feed(table, seeded(start, plan.privacy.noise_multiplier * plan.privacy.clip))


def batches_of(plan: Plan, data: Mapping[str, Dataset], round: int) -> Tree:
    """One round's batches of every site, ``[K, S, ...]``, padded to the largest: rows of :func:`feed_of`'s table."""
    sizes = torch.tensor([len(data[site].train.y) for site in plan.sites])
    masks = [draw(plan.local, int(n), plan.seed, round, site) for n, site in zip(sizes, plan.sites, strict=True)]
    rows, live = numbered(masks)
    batches = {
        "rows": rows + (sizes.cumsum(0) - sizes)[:, None, None],
        "live": live,
        "scale": (1.0 / (plan.local.rate * sizes))[:, None].expand(-1, plan.local.steps),
        "seed": torch.stack([choices(plan, round, site) for site in plan.sites]),
    }
    if plan.privacy is not None and plan.privacy.noise_multiplier is not None:
        numbers = [seeds.number(plan.seed, "noise", round, site) for site in plan.sites]
        batches["noise_seed"] = torch.tensor(numbers)
    return batches


def measured(recipe: Recipe, strategy: Strategy, state: Tree, data: Mapping[str, Dataset]) -> dict[str, Metrics]:
    """The current model's metrics at every site."""
    params = model_in(strategy.broadcast(state))
    return {site: recipes.evaluate(recipe, params, one.test) for site, one in data.items()}


def _epsilon(plan: Plan) -> float | None:
    if plan.privacy is None or plan.privacy.noise_multiplier is None:
        return None
    charge = Charge(plan.privacy.noise_multiplier, plan.local.rate, plan.local.steps)
    return epsilon([charge] * plan.rounds, plan.privacy.delta)
