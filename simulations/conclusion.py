"""What a simulated study's result says: metrics as they leave the sites, what was spent, and what was sent."""

import time
from collections.abc import Mapping

import torch

from fedtailor import recipe as recipes
from fedtailor import tree
from fedtailor.baseline import train_alone
from fedtailor.recipe import Dataset, Metrics, Part, Recipe
from fedtailor.result import Kind, Result, SiteResult, Timing, model_file, privacy_result, versions, weighted
from fedtailor.simulations.clients import epsilon_of, sampling_of
from fedtailor.simulations.hardware import HOST, placed
from fedtailor.simulations.policies import Gate
from fedtailor.simulations.setting import Setting
from fedtailor.simulations.standing import Standing
from fedtailor.simulations.traffic import received
from fedtailor.strategy import Strategy, model_in
from fedtailor.tree import Params, Tree


def concluded(study: Setting, at: Standing, began: float, setup_s: float) -> tuple[Result, Params]:
    """The result and the final parameters.

    Args:
        began: when the simulation did, by the monotonic clock; earlier by what processes before this one took.
        setup_s: seconds before its first round.
    """
    plan, recipe, strategy, data, gate = study.plan, study.recipe, study.strategy, study.data, study.gate
    on = study.device
    history = [*at.history, {"round": plan.rounds, "sites": measured(recipe, strategy, at.state, data, on)}]
    own, alone, of = dict[str, Metrics](), dict[str, Metrics](), study.population
    if of is None:
        own = personal(recipe, strategy, at.state, at.memory, data, on)
    if plan.evaluation.baseline and of is None:
        for site in plan.sites:
            params = train_alone(recipe, _there(data[site].train, on), plan, site)
            alone[site] = _evaluated(recipe, params, data[site].test, on)
    if gate is not None:
        own, alone = _left(gate, own, data, -2), _left(gate, alone, data, -1)
        for past in history:
            past["sites"] = _left(gate, past["sites"], data, past["round"])
    rows = {site: len(data[site].train.y) for site in plan.sites}
    params = placed(HOST, model_in(strategy.broadcast(at.state)))
    rate = 1.0 if of is None else sampling_of(plan, of).rate
    spent, cast = epsilon_of(plan, plan.rounds, rate), received(plan, strategy, at.state) if of is None else 0
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
                bytes_sent=study.sent[site],
                bytes_received=cast,
            )
            for site in plan.sites
        },
        metrics={kind: weighted(by_site, rows) for kind, by_site in kinds.items()},
        privacy=None
        if plan.privacy is None or spent is None
        else privacy_result(plan.privacy, spent, None if of is None else of.partition, rate),
        timing=Timing(wall_s=time.monotonic() - began, setup_s=setup_s, round_s=at.round_s, virtual_s=at.virtual_s),
        transport=None,
        engine="simulation",
        seed=plan.seed,
        model=model_file(params),
        versions=versions(),
        dropped=study.empty + at.stale + ([] if gate is None else gate.dropped),
        population=None if of is None else of.model_dump(),
        history=[h | {"metrics": weighted(h["sites"], rows)} for h in history],
    )
    return result, params


def _left(gate: Gate, measured: Mapping[str, Metrics], data: Mapping[str, Dataset], which: int) -> dict[str, Metrics]:
    """The metrics that leave their sites."""
    left = {site: gate.metrics(site, metrics, len(data[site].test.y), which) for site, metrics in measured.items()}
    return {site: metrics for site, metrics in left.items() if metrics is not None}


def measured(
    recipe: Recipe, strategy: Strategy, state: Tree, data: Mapping[str, Dataset], device: torch.device
) -> dict[str, Metrics]:
    """The current model's metrics at every site."""
    params = model_in(strategy.broadcast(state))
    return {site: _evaluated(recipe, params, one.test, device) for site, one in data.items()}


def personal(
    recipe: Recipe, strategy: Strategy, state: Tree, memory: Tree, data: Mapping[str, Dataset], device: torch.device
) -> dict[str, Metrics]:
    """The metrics of each site's own model; empty where the strategy gives it none."""
    if strategy.personal is None:
        return {}
    cast = placed(HOST, strategy.broadcast(state))
    own = {site: strategy.personal(cast, tree.at(memory, k)) for k, site in enumerate(data)}
    return {site: _evaluated(recipe, own[site], one.test, device) for site, one in data.items()}


def _evaluated(recipe: Recipe, params: Params, part: Part, device: torch.device) -> Metrics:
    """Metrics on the device, of parameters and examples from anywhere."""
    return recipes.evaluate(recipe, placed(device, params), _there(part, device))


def _there(part: Part, device: torch.device) -> Part:
    return Part(part.x.to(device), part.y.to(device))
