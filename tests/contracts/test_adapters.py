"""What strategies keep in a world of adapters: frozen weights that do not travel, shifts that only the server moves."""

import pytest
import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

from fedtailor import leaving, strategies, tree
from fedtailor import recipe as recipes
from fedtailor.adapters import LORA_A, LORA_B, SHIFT, is_part, layers
from fedtailor.client.work import perform
from fedtailor.config import build
from fedtailor.config import load as compose
from fedtailor.datasets import Loaded
from fedtailor.privacy import private
from fedtailor.recipe import Recipe
from fedtailor.server.folding import Closed, advance, counted
from fedtailor.simulations.run import simulate
from fedtailor.strategy import Local, Strategy, model_in, standing
from fedtailor.training import parted
from fedtailor.wire import Visit

ADAPTED = {
    "fedavg": {},
    "fedadam": {"lr": 0.01},
    "scaffold": {"population": 3},
    "feddyn": {},
    "fedprox": {"of": "fedex_lora", "mu": 0.1},
    "robust": {"of": "fedex_lora"},
    "topk": {"of": "fedex_lora", "fraction": 0.5},
    "ffa_lora": {},
    "ffa_lora of scaffold": {"of": {"name": "scaffold", "population": 3}},
    "ffa_lora of fedexp": {"of": "fedexp"},
    "fedex_lora": {},
    "flora": {},
    "flora with ranks": {"ranks": [[0, 1], [40, 2]]},
    "fedper": {"of": "fedex_lora", "own": ["*head*"]},
    "ditto": {"of": "ffa_lora"},
}
ROUNDS, SITES = 3, {"a": 40, "b": 60, "c": 90}


def spec(name):
    return {"_target_": f"fedtailor.strategies.{name.split()[0]}"} | ADAPTED[name]


CONTRACT = {
    "name": "made-up",
    "columns": [{"name": name, "kind": "number", "bounds": [-4, 4]} for name in "abc"],
    "label": {"name": "ill", "positive": [1], "negative": [0]},
}
RECIPE = {"contract": CONTRACT, "model": "mlp", "hidden": 5, "adapters": 2, "exact": True}


def plan_of(name):
    plan = compose(["study=heart", "privacy=none", "local.steps=3", f"rounds={ROUNDS}", "quorum=3"]).plan
    fields = {"recipe": {"_target_": "fedtailor.recipes.tabular"} | RECIPE, "strategy": spec(name), "sites": [*SITES],
              "evaluation": {"baseline": False, "every": 100}}  # fmt: skip
    return plan.model_validate(plan.model_dump(by_alias=True) | fields)


@pytest.fixture(scope="module")
def sources():
    """Made-up people; who is ill follows a - b."""
    found = {}
    for site, rows in SITES.items():
        a, b, c, noise = torch.randn(4, rows, generator=torch.Generator().manual_seed(rows)).clamp(-4, 4)
        table = {"a": a, "b": b, "c": c, "ill": (a - b + 0.5 * noise > 0).int()}
        found[site] = Loaded({name: [f"{v:.4f}" for v in values] for name, values in table.items()})
    return found


def visit(plan, round):
    return Visit(run="r", round=round, train=True, evaluate=False, baseline=False, plan=plan.canonical(),
                 cast_sha256="0" * 64)  # fmt: skip


def deployed(plan, data, order):
    """What sites and a coordinator do, without a network; the state after every round lies in a file."""
    recipe, strategy = build(plan.recipe, Recipe), build(plan.strategy, Strategy)
    start = recipes.initial(recipe, plan.seed)
    state, memory, like = strategy.init(start), {site: {} for site in order}, leaving.summand(plan, strategy, start)
    for round in range(plan.rounds):
        cast, acc, reports = strategy.broadcast(state), None, {}
        for site in order:
            work = perform(visit(plan, round), cast, data[site], memory[site], site=site, key=None)
            leaving.agreed(plan.canonical()).check(tree.flatten(work.summand), train=True)
            memory[site], reports[site] = work.memory, work.report
            acc = strategy.reduce.add(acc, tree.at(work.summand, None))
        closed = Closed(acc=acc, reports=reports, received={}, dropped={}, sent={})
        state = advance(strategy, lambda kept=state: kept, counted(plan, closed, round), round, like)
        saved = to_bytes({k: v.contiguous() for k, v in tree.flatten(state).items()})
        state = tree.unflatten(dict(sorted(from_bytes(saved).items())))
    return model_in(strategy.broadcast(state))


@pytest.mark.parametrize("name", ADAPTED)
def test_sites_and_a_coordinator_do_what_the_simulation_does(name, sources):
    plan = plan_of(name)
    recipe = build(plan.recipe, Recipe)
    data = {site: recipe.prepare(source.table()) for site, source in sources.items()}
    ends = [deployed(plan, data, order) for order in ("abc", "cab")]
    ends += [simulate(plan, sources, block=block)[1] for block in (1, 2, 64)]
    start = recipes.initial(recipe, plan.seed)
    for end in ends:
        assert end.keys() == start.keys()
        for path in end:
            torch.testing.assert_close(end[path], ends[0][path], rtol=2e-5, atol=2e-6, msg=f"{name}: {path}")
    moved = {path for path in start if not torch.equal(start[path], ends[0][path])}
    still = {part for part in (LORA_A, SHIFT) for path in start if is_part(path, part) and path not in moved}
    averaged = name in (
        "fedavg",
        "fedadam",
        "scaffold",
        "feddyn",
        "robust",
    )  # robust decides on one reply: nothing is left
    assert still == ({LORA_A, SHIFT} if "ffa" in name + str(ADAPTED[name]) else {SHIFT} if averaged else set())


def world():
    rng = torch.Generator().manual_seed(1)
    shapes = {f"x.{LORA_A}": (2, 4), f"x.{LORA_B}": (3, 2), f"x.{SHIFT}": (3, 4), "head.bias": (3,)}
    return {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def told(strategy, params, ends, lr=0.1):
    """The total of clients of 50 rows whose training ended at ``ends``."""
    acc, one = None, torch.tensor(5.0)
    cast, memory = strategy.broadcast(strategy.init(params)), strategy.remember(params)
    for end in ends:
        seed = torch.tensor(0)
        summand, _ = strategy.report(Local(cast, memory, end, one * 10, one, lr, seed=seed, loss=one))
        acc = strategy.reduce.add(acc, tree.at(summand, None))
    return strategy.reduce.done(acc)


def functional(params):
    """What the model computes: an adapter counts by its product, not by its halves."""
    whole = {layer: params[layer + SHIFT] + params[layer + LORA_B] @ params[layer + LORA_A] for layer in layers(params)}
    return whole | {"head.bias": params["head.bias"]}


def assert_close(a, b):
    for path in a.keys() | b.keys():
        torch.testing.assert_close(a[path], b[path], rtol=1e-5, atol=1e-5, msg=path)


def elsewhere(strategy, params, by):
    """Where a client's training may end: what moves has moved."""
    begun = strategy.start(strategy.broadcast(strategy.init(params)), strategy.remember(params))
    return tree.joined(begun, tree.map(lambda p: p + by, parted(begun, strategy.trains)[0]))


@pytest.mark.parametrize("name", ADAPTED)
def test_clients_that_stand_still_leave_the_model_where_it_is(name):
    strategy, params = getattr(strategies, name.split()[0])(**ADAPTED[name]), world()
    state = strategy.init(params)
    end = strategy.apply(state, told(strategy, params, [elsewhere(strategy, params, 0.0)] * 3), 0)
    assert_close(functional(model_in(strategy.broadcast(end))), functional(params))


@pytest.mark.parametrize("name", ADAPTED)
def test_equal_clients_count_as_one(name):
    strategy, params = getattr(strategies, name.split()[0])(**ADAPTED[name]), world()
    end = elsewhere(strategy, params, 0.3)
    one, many = (strategy.apply(strategy.init(params), told(strategy, params, [end] * n), 0) for n in (1, 5))
    assert_close(*(functional(model_in(strategy.broadcast(state))) for state in (one, many)))


@pytest.mark.parametrize("name", ADAPTED)
def test_functions_are_pure(name):
    strategy, params = getattr(strategies, name.split()[0])(**ADAPTED[name]), world()
    state = strategy.init(params)
    before, total = tree.map(torch.clone, state), told(strategy, params, [elsewhere(strategy, params, 0.3)] * 2)
    after = strategy.apply(state, total, 0)
    assert_close(tree.flatten(state), tree.flatten(before))
    assert {k: v.shape for k, v in tree.flatten(after).items()} == {k: v.shape for k, v in tree.flatten(state).items()}


def test_a_private_sum_of_half_adapters_bounds_what_one_client_changes():
    """Its noise reaches what is sent only: the frozen half and the shift stay as they are."""
    strategy, params = private(strategies.ffa_lora(), clip=1.0, noise_multiplier=0.5, cohort=3), world()
    summand = standing(strategy, elsewhere(strategy, params, 0.0))
    assert f"delta/x.{LORA_A}" not in tree.flatten(summand)
    far = told(strategy, params, [elsewhere(strategy, params, 1e6)])
    assert tree.norm(far["delta"]) <= 1 + 1e-6
    end = strategy.broadcast(strategy.apply(strategy.init(params), far, 0))["params"]
    assert torch.equal(end[f"x.{LORA_A}"], params[f"x.{LORA_A}"])
    assert not torch.equal(end[f"x.{LORA_B}"], params[f"x.{LORA_B}"])
