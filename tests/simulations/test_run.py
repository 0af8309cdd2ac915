"""A whole simulated study: against a centralised reference, against itself, and against the accountant."""

import subprocess
import sys

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from fedtailor import recipe as recipes
from fedtailor import tree
from fedtailor.baseline import train_alone
from fedtailor.config import build, load
from fedtailor.datasets import Loaded
from fedtailor.errors import ConfigError, ContractError
from fedtailor.privacy.accounting import Charge, epsilon
from fedtailor.privacy.planning import resolve
from fedtailor.recipe import Recipe
from fedtailor.result import Result, model_bytes
from fedtailor.simulations.run import simulate

PRIVACY = {"epsilon": 3.0, "delta": 1e-4, "clip": 1.0}


def assert_close(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)


def test_one_full_step_a_round_is_gradient_descent_on_everybodys_rows(plan, sources):
    made = plan(rounds=5, local={"steps": 1, "rate": 1.0, "lr": 0.3})
    _, params = simulate(made, sources)
    recipe = build(made.recipe, Recipe)
    parts = [recipe.prepare(sources[site].table()).train for site in made.sites]
    x, y = torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts])
    torch.manual_seed(0)
    module = recipe.model()
    sgd = torch.optim.SGD(module.parameters(), lr=0.3)
    for _ in range(5):
        sgd.zero_grad()
        binary_cross_entropy_with_logits(module(x), y).backward()
        sgd.step()
    assert_close(params, {name: p.detach() for name, p in module.named_parameters()}, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("privacy", [None, PRIVACY], ids=["plain", "private"])
@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_the_block_does_not_show(plan, sources, strategy, privacy):
    spec = {"_target_": f"fedtailor.strategies.{strategy}"} | ({"population": 3} if strategy == "scaffold" else {})
    made = plan(strategy=spec, privacy=privacy)
    ends = [simulate(made, sources, block=block)[1] for block in (1, 2, 64)]
    assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)
    assert_close(ends[0], ends[2], rtol=1e-5, atol=1e-6)


def test_a_run_repeats_and_a_seed_changes_it(plan, sources):
    ends = [model_bytes(simulate(plan(seed=seed, privacy=PRIVACY), sources)[1]) for seed in (1, 1, 2)]
    assert ends[0] == ends[1] != ends[2]


def test_the_order_of_sites_does_not_show(plan, sources):
    one = simulate(plan(sites=["north", "south", "west"], privacy=PRIVACY), sources)[1]
    other = simulate(plan(sites=["west", "north", "south"], privacy=PRIVACY), sources)[1]
    assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_privacy_stated_is_the_accountants(plan, sources):
    made = plan(privacy=PRIVACY)
    result, _ = simulate(made, sources)
    noise = resolve(made).privacy.noise_multiplier
    spent = epsilon([Charge(noise, 0.4, 2)] * 3, 1e-4)
    assert result.privacy is not None and result.privacy.epsilon_max == spent <= 3.0
    assert all(site.epsilon == spent for site in result.sites.values())
    assert "PLD (dp-accounting)" in result.privacy.accountant


def test_noise_has_the_deviation_that_was_accounted_for(plan, sources):
    """With every gradient clipped to nearly nothing, one step moves by lr * noise / expected size."""
    clip, noise = 1e-3, 50.0
    privacy = PRIVACY | {"clip": clip, "noise_multiplier": noise}
    moves = []
    for seed in range(60):
        made = plan(rounds=1, seed=seed, sites=["north"], quorum=1, privacy=privacy, evaluation={"baseline": False})
        made = made.model_copy(update={"local": made.local.model_copy(update={"steps": 1})})
        result, params = simulate(made, sources)
        moves += [p.flatten() for p in params.values()]
    rows = len(build(made.recipe, Recipe).prepare(sources["north"].table()).train.y)
    expected = 0.3 * clip * noise / (0.4 * rows)
    assert torch.cat(moves).std().item() == pytest.approx(expected, rel=0.12)


def test_without_privacy_none_is_claimed(plan, sources):
    result, _ = simulate(plan(), sources)
    assert result.privacy is None and all(site.epsilon is None for site in result.sites.values())


def test_the_result_is_complete_and_survives_json(plan, sources):
    events = []
    made = plan(rounds=5, evaluation={"every": 2})
    result, params = simulate(made, sources, on_event=events.append)
    assert Result.model_validate_json(result.model_dump_json(by_alias=True)) == result
    assert result.engine == "simulation" and result.transport is None and result.rounds == 5
    assert set(result.sites) == set(made.sites) and {name: s.rows for name, s in result.sites.items()} == {
        "north": 40,
        "south": 60,
        "west": 90,
    }
    assert [entry["round"] for entry in result.history] == [0, 2, 4, 5]
    assert [event["round"] for event in events if event["kind"] == "round"] == [1, 2, 3, 4, 5] and len(
        result.timing.round_s
    ) == 5
    assert result.model.parameters == sum(p.numel() for p in params.values())


def test_the_metrics_are_those_of_the_released_model(plan, sources):
    made = plan()
    result, params = simulate(made, sources)
    recipe = build(made.recipe, Recipe)
    for site, found in result.sites.items():
        test = recipe.prepare(sources[site].table()).test
        assert found.metrics["federated"] == recipes.evaluate(recipe, params, test)


def test_training_alone_is_a_federation_of_one(plan, sources):
    made = plan()
    result, _ = simulate(made, sources)
    recipe = build(made.recipe, Recipe)
    for site in made.sites:
        data = recipe.prepare(sources[site].table())
        alone = train_alone(recipe, data.train, made, site)
        of_one, params = simulate(plan(sites=[site], quorum=1), {site: sources[site]})
        assert_close(alone, params, rtol=1e-5, atol=1e-6)
        assert result.sites[site].metrics["local_only"] == recipes.evaluate(recipe, alone, data.test)


def test_a_baseline_is_trained_without_noise_even_in_a_private_study(plan, sources):
    private, _ = simulate(plan(privacy=PRIVACY), sources)
    plainly, _ = simulate(plan(), sources)
    assert private.metrics["local_only"] == plainly.metrics["local_only"]
    assert private.metrics["federated"] != plainly.metrics["federated"]


def test_no_baseline_if_none_is_wanted(plan, sources):
    result, _ = simulate(plan(evaluation={"baseline": False}), sources)
    assert result.metrics["local_only"] == {}


def test_a_site_without_data_is_named(plan, sources):
    with pytest.raises(ConfigError, match="'east'.*north, south, west"):
        simulate(plan(sites=["north", "east"], quorum=2), sources)


def test_a_site_whose_data_break_the_contract_is_named(plan, sources):
    broken = {name: list(cells) for name, cells in sources["south"].table().items()}
    broken["a"][6] = "99"
    with pytest.raises(ContractError, match="south: .*a.*99"):
        simulate(plan(), sources | {"south": Loaded(broken)})


def test_the_shipped_study_helps_the_hospitals():
    """Over five seeds: together they do better than alone on their own held-out patients, and privacy costs little."""
    auroc = {"none": [], "record": [], "alone": []}
    for seed in range(5):
        for privacy in ("none", "record"):
            splits = ["evaluation.every=20", f"seed={seed}", f"++recipe.split_seed={seed}"]
            plan, simulation = load(["study=heart", f"privacy={privacy}", *splits])
            result, params = simulate(plan, build(simulation.data, dict))
            assert all(bool(torch.isfinite(p).all()) for p in tree.leaves(params))
            assert result.sites["switzerland"].metrics["federated"]["auroc"] is None, "too few healthy patients"
            va = result.sites["va"].metrics
            auroc[privacy].append((result.metrics["federated"]["auroc"], va["federated"]["auroc"]))
        auroc["alone"].append((result.metrics["local_only"]["auroc"], va["local_only"]["auroc"]))
    (plain, va_plain), (private, va_private), (alone, va_alone) = (
        torch.tensor(auroc[arm]).mean(0).tolist() for arm in ("none", "record", "alone")
    )
    assert plain >= alone and private >= plain - 0.02
    assert va_plain > va_alone and va_private > va_alone


def test_simulating_needs_no_flower():
    code = "import sys, fedtailor.simulations.run; sys.exit('flwr' in sys.modules or 'opacus' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
