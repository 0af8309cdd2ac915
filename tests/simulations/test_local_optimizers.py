"""Clients in a block, each with momentum or moments of its own, are the same clients one at a time."""

import pytest
import torch
from folk import CLIP, K, S, assert_close, made, one_by_one, reference, started, world

from fedtailor import recipe as recipes
from fedtailor import strategies, tree
from fedtailor.baseline import train_alone
from fedtailor.batches import draw, pack
from fedtailor.config import build, load
from fedtailor.optimizers import adam, sgd
from fedtailor.recipe import Recipe
from fedtailor.simulations.blocks import block_train
from fedtailor.simulations.cohort import prepared
from fedtailor.simulations.feed import NOTHING
from fedtailor.simulations.paths import Round, Task, choose
from fedtailor.simulations.run import simulate

# A moment's root is added to what rounding does not reach: Adam makes a whole step of a gradient that is nearly nothing.
RULES = {
    "momentum": sgd(0.9),
    "nesterov": sgd(0.8, nesterov=True, weight_decay=0.1),
    "weight decay": sgd(weight_decay=0.2),
    "adam": adam(eps=1e-3),
    "adamw": adam((0.7, 0.9), eps=1e-3, weight_decay=0.3, decoupled=True),
}
STRATEGIES = {
    "fedavg": strategies.fedavg(),
    "fedprox": strategies.fedprox(mu=0.5),
    "ditto": strategies.ditto(pull=0.3),
    "feddyn": strategies.feddyn(alpha=0.1),
}
BOTH = pytest.mark.parametrize("clip", [None, CLIP], ids=["plain", "clipped"])


CASES = [(rule, "mlp", which) for rule in RULES for which in STRATEGIES]
CASES += [("adamw", name, "fedavg") for name in ("text", "conv2d", "gru")]


@BOTH
@pytest.mark.parametrize(("rule", "name", "which"), CASES)
def test_a_block_is_its_clients_one_at_a_time(rule, name, which, clip):
    """Of unequal clients: some take fewer steps, one has examples in none."""
    recipe, inputs = made(name)
    strategy, optimizer = STRATEGIES[which], RULES[rule]
    params, batches, live, counts = world(recipe, inputs, clip, strategy)
    cast, memory = started(strategy, params)
    train = reference(recipe, strategy, clip, 0.03, optimizer)
    expected = one_by_one(train, cast, memory, batches, live, counts)
    found = block_train(recipe, strategy, 0.03, clip, optimizer=optimizer)(cast, memory, batches, live, counts)
    assert_close(found, expected)
    plain = block_train(recipe, strategy, 0.03, clip)(cast, memory, batches, live, counts)
    assert float(tree.norm(tree.map(torch.sub, found[0]["delta"], plain[0]["delta"]))) > 1e-3


@BOTH
@pytest.mark.parametrize("name", ["mlp", "wide"])
def test_the_sum_of_a_block_is_its_clients_sum(name, clip):
    """Also of wide layers, whose weights are made where gradients are kept: a change is then of no low rank."""
    recipe, inputs = made(name)
    strategy = strategies.fedavg()
    params, batches, live, counts = world(recipe, inputs, clip)
    each, _ = one_by_one(
        reference(recipe, strategy, clip, 0.03, RULES["adamw"]), {"params": params}, {}, batches, live, counts
    )
    task = Task(recipe, strategy, 0.03, clip, NOTHING, 64, together=True, optimizer=RULES["adamw"])
    way = choose("auto", task, Round({"params": params}, {}, batches, live, counts))
    assert way.path == "block"
    found, _ = way.many({"params": params}, {}, batches, live, counts)
    assert_close((tree.map(lambda x: x.sum(0)[None], found), {}), (tree.map(lambda x: x.sum(0)[None], each), {}))


@BOTH
def test_all_ways_lead_to_one_result(clip):
    recipe, inputs = made("mlp")
    params, batches, live, counts = world(recipe, inputs, clip)
    given = Round({"params": params}, {}, batches, live, counts)
    task = Task(recipe, strategies.fedavg(), 0.03, clip, NOTHING, 2, False, optimizer=RULES["adam"])
    found = [choose(path, task, given).many(*given) for path in ("block", "vmap", "loop")]
    assert_close(found[0], found[1])
    assert_close(found[0], found[2])


def test_a_steps_padding_moves_nothing():
    """A client of one step is where it is after one, however many steps the others take."""
    recipe, inputs = made("mlp")
    params, batches, _, counts = world(recipe, inputs, None)
    for optimizer in RULES.values():
        train = block_train(recipe, strategies.fedavg(), 0.03, optimizer=optimizer)
        one = torch.zeros(K, S, dtype=torch.double)
        one[:, 0] = 1
        long = train({"params": params}, {}, batches, one, counts)[0]
        short = train({"params": params}, {}, tree.at(batches, (slice(None), slice(0, 1))), one[:, :1], counts)[0]
        assert_close((long, {}), (short, {}))


WORDS = ["study=heart", "rounds=2", "recipe.model=mlp", "local.lr=0.02", "local.optimizer=adamw"]


@pytest.mark.parametrize("privacy", [pytest.param("none", marks=pytest.mark.slow), "record"])
def test_a_studys_block_size_and_workers_do_not_show(privacy):
    plan, simulation = load([*WORDS, f"privacy={privacy}"])
    sources = build(simulation.data, dict)
    ends = [simulate(plan, sources, **how)[1] for how in ({}, {"block": 1}, {"workers": 2}, {"path": "vmap"})]
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-5, atol=1e-5)
    sgd_ = plan.model_copy(
        update={"local": plan.local.model_copy(update={"optimizer": load(WORDS[:-1]).plan.local.optimizer})}
    )
    assert any(not torch.equal(simulate(sgd_, sources)[1][name], ends[0][name]) for name in ends[0])


def test_a_site_alone_keeps_its_optimizer_from_round_to_round():
    """It trains on, as it would without a study."""
    plan, simulation = load([*WORDS, "privacy=none"])
    recipe = build(plan.recipe, Recipe)
    data = prepared(plan, recipe, build(simulation.data, dict))["cleveland"].train
    module = recipe.model()
    module.load_state_dict(recipes.initial(recipe, plan.seed))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02)
    for round in range(2):
        batches = pack(data, draw(plan.local, len(data.y), plan.seed, round, "cleveland"), plan.local.rate)
        for x, y, live, scale in zip(*(batches[name] for name in ("x", "y", "live", "scale")), strict=True):
            optimizer.zero_grad()
            ((recipe.losses(module(x), y) * live).sum() * scale).backward()
            optimizer.step()
    found = train_alone(recipe, data, plan, "cleveland")
    torch.testing.assert_close(found, dict(module.state_dict()), rtol=1e-4, atol=1e-6)
