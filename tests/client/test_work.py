"""What a site's visits come to is what the simulator says, also where the site keeps a model of its own."""

import hashlib

import pytest
import torch
from answers import METRICS, POLICY, VISIT, written

from fedtailor import leaving, store, tree
from fedtailor import recipe as recipes
from fedtailor.client import airlock, inbox
from fedtailor.client.work import perform
from fedtailor.config import build, load
from fedtailor.policy import Case, charges_of, verdict
from fedtailor.recipe import Recipe
from fedtailor.result import weighted
from fedtailor.simulations.cohort import prepared
from fedtailor.simulations.run import simulate
from fedtailor.strategy import Strategy
from fedtailor.wire import Visit

HEART = ["study=heart", "privacy=none", "rounds=3", "recipe.model=mlp", "norm=null", "evaluation.baseline=false"]


def loaded(flat):
    """As from a file, which keeps no empty branch."""
    return tree.unflatten(flat)


OTHERS = [
    "fedavg local.sampling=shuffled local.rate=0.25 local.steps=6",
    "fedavg local.optimizer={name: adamw, eps: 0.1}",
    "ditto local.optimizer={name: sgd, momentum: 0.9, weight_decay: 0.01}",
]


@pytest.mark.parametrize("strategy", ["fedper", "fedbn", "ditto", "scaffold", *OTHERS])
def test_visits_come_to_what_is_simulated(strategy):
    plan, simulation = load([*HEART, *f"strategy={strategy}".split(maxsplit=strategy.count("local."))])
    sources = build(simulation.data, dict)
    recipe, rule = build(plan.recipe, Recipe), build(plan.strategy, Strategy)
    data = prepared(plan, recipe, sources)
    state, memories, own = rule.init(recipes.initial(recipe, plan.seed)), {site: {} for site in plan.sites}, {}
    for round in range(plan.rounds + 1):
        cast, acc, train = rule.broadcast(state), None, round < plan.rounds
        sha = hashlib.sha256(b"".join(store.safetensors(tree.flatten(cast)))).hexdigest()
        visit = Visit(run="r", round=round, train=train, evaluate=True, baseline=False, plan=plan.canonical(),
                      cast_sha256=sha)  # fmt: skip
        for site in plan.sites:
            work = perform(visit, cast, data[site], loaded(tree.flatten(memories[site])), site=site, key=None)
            own[site] = work.report.personal
            if train:
                memories[site] = work.memory
                acc = rule.reduce.add(acc, tree.at(work.summand, None))
        state = rule.apply(state, rule.reduce.done(acc), round) if train else state
    result, params = simulate(plan, sources)
    found = rule.broadcast(state)["params"]
    torch.testing.assert_close(found, params, rtol=1e-5, atol=1e-5)
    if rule.personal is None:
        assert set(own.values()) == {None} and "personal" not in result.metrics
    else:
        rows = {site: len(data[site].train.y) for site in plan.sites}
        assert weighted(own, rows)["auroc"] == pytest.approx(result.metrics["personal"]["auroc"], abs=1e-4)
        assert result.metrics["personal"] != result.metrics["federated"]


@pytest.mark.parametrize("strategy", ["ditto", "fedavg"])
def test_a_site_keeps_the_better_of_its_own_model_and_the_shared_one(strategy):
    plan, simulation = load([*HEART, f"strategy={strategy}"])
    recipe, rule = build(plan.recipe, Recipe), build(plan.strategy, Strategy)
    data = prepared(plan, recipe, build(simulation.data, dict))["va"]
    start = recipes.initial(recipe, plan.seed)
    cast, memory = rule.broadcast(rule.init(start)), rule.remember(start)
    part, losses = data.test, recipes.losses(recipe)
    worse = tree.map(lambda p: p + 3, start)
    for own, shared in ((worse, start), (start, worse)):
        given = cast | {"params": shared}, memory | ({"own": own} if strategy == "ditto" else {})
        for train in (True, False):
            visit = Visit(run="r", round=3 - train, train=train, evaluate=True, baseline=False, plan=plan.canonical(),
                          cast_sha256="0" * 64)  # fmt: skip
            model = perform(visit, given[0], data, given[1], site="va", key=None).model
            if train or strategy == "fedavg":  # the shared model is in the coordinator's result
                assert model == {}
            else:
                assert losses(model, part.x, part.y).mean() == losses(start, part.x, part.y).mean()


def test_an_own_models_metrics_leave_where_the_plan_gives_the_site_one(tmp_path):
    for models, expected in ((1, None), (2, METRICS["auroc"])):
        outbox = tmp_path / str(models)
        outbox.mkdir()
        leaves = leaving.agreed(VISIT.plan).model_copy(update={"models": models})
        out = written(tmp_path, personal=METRICS)
        airlock.admit(out, outbox, VISIT, leaves, POLICY, airlock.Facts(rows=200, test_rows=66))
        left = inbox.stored(outbox, VISIT).report.personal
        assert (left and left["auroc"]) == expected


def test_both_models_measured_are_both_charged_for():
    noised = POLICY.model_copy(update={"metric_noise": 20.0, "without_privacy": True, "epsilon": 0.2})
    plan = load([*HEART, "strategy=ditto"]).plan
    assert leaving.agreed(plan.canonical()).models == 2 and leaving.agreed(load(HEART).plan.canonical()).models == 1
    assert (len(charges_of(noised, plan)), len(charges_of(noised, plan, 2))) == (4, 8)
    budgets = [
        next(float(rule.asked) for rule in verdict(noised, plan, Case("va", [], 1000, n)) if rule.code == "budget")
        for n in (1, 2)
    ]
    assert budgets[1] > budgets[0] > 0
