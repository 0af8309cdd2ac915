"""A site's policy: what it allows goes through, and each rule refuses by its own code, naming what was asked."""

from datetime import datetime

import pytest
from pydantic import ValidationError

from fedtailor.config import load
from fedtailor.errors import RefusedError
from fedtailor.policy import Case, Hours, Policy, charge_of, open_now, refuse, verdict
from fedtailor.privacy.accounting import Charge, epsilon
from fedtailor.study import Spec

STRICT = {
    "studies": ["heart", "other"],
    "epsilon": 8.0,
    "epsilon_per_study": 4.0,
    "delta": 1e-4,
    "least_noise": 1.0,
    "greatest_clip": 1.0,
    "recipes": ["tabular"],
    "strategies": ["fedavg", "scaffold"],
    "max_rounds": 20,
    "max_steps": 10,
    "minimum_cohort": 2,
    "partners": ["b", "c"],
    "max_upload_mb": 1,
}
POLICY = Policy.model_validate(STRICT)
PLAN = load(["study=heart", "sites=[a,b]", "quorum=2", "rounds=5", "local.steps=4", "local.rate=0.1",
             "privacy.epsilon=4.0", "privacy.delta=1e-5", "privacy.noise_multiplier=1.5"]).plan  # fmt: skip
CASE = Case("a", [], 1000)


def loosened(**changed):
    return POLICY.model_copy(update=changed)


def private(**changed):
    return {"privacy": PLAN.privacy.model_copy(update=changed)}


def local(**changed):
    return {"local": PLAN.local.model_copy(update=changed)}


def codes(plan, policy=POLICY, case=CASE):
    return [rule.code for rule in verdict(policy, plan, case) if not rule.ok]


def test_a_plan_within_the_policy_is_accepted():
    assert codes(PLAN) == []
    refuse(verdict(POLICY, PLAN, CASE))
    assert charge_of(PLAN) == Charge(1.5, 0.1, 4)


WHOLE = epsilon([Charge(1.5, 0.1, 4)] * 5, 1e-5)
ASKED = {  # the rule that refuses -> a change of the plan, or of the case
    "roster": {"sites": ("b", "c")},
    "study": {"study": "lungs"},
    "recipe": {"recipe": PLAN.recipe.model_copy(update={"target": "fedtailor.recipes.images"})},
    "strategy": {"strategy": PLAN.strategy.model_copy(update={"target": "fedtailor.strategies.median"})},
    "partners": {"sites": ("a", "b", "mallory")},
    "cohort": {"quorum": 1},
    "rounds": {"rounds": 21, **private(epsilon=1e3)},
    "steps": {**local(steps=11), **private(epsilon=1e3)},
    "noise": private(noise_multiplier=0.99, epsilon=1e3),
    "delta": private(delta=2e-4),
    "epsilon": private(epsilon=WHOLE * 0.9999),
    "clip": private(clip=1.01),
}


@pytest.mark.parametrize("code", ASKED)
def test_each_rule_refuses_what_it_is_for(code):
    plan = PLAN.model_copy(update=ASKED[code])
    found = codes(plan)
    assert code in found and set(found) <= {code, "epsilon-per-study", "budget"}
    with pytest.raises(RefusedError) as error:
        refuse(verdict(POLICY, plan, CASE))
    assert error.value.code == found[0] and "allowed is" in str(error.value)


def test_a_strategy_inside_another_must_be_allowed_too():
    def plan(of):
        spec = Spec.model_validate({"_target_": "fedtailor.strategies.krum", "of": of})
        return PLAN.model_copy(update={"strategy": spec})

    policy = loosened(strategies=("krum", "fedavg"))
    for of in ("fedavg", {"name": "fedavg", "server_lr": 0.5}, {"name": "krum", "of": "fedavg"}):
        assert codes(plan(of), policy) == []
    for of in ("scaffold", {"name": "scaffold"}, {"name": "fedavg", "of": {"name": "scaffold"}}, {"mu": 1}, 7):
        assert codes(plan(of), policy) == ["strategy"]


def test_the_whole_study_counts_and_not_one_round():
    assert epsilon([Charge(1.5, 0.1, 4)], 1e-5) < 0.9 * WHOLE
    assert codes(PLAN.model_copy(update=private(epsilon=WHOLE))) == []
    assert codes(PLAN.model_copy(update={**private(epsilon=WHOLE), "rounds": 6})) == ["epsilon"]
    assert codes(PLAN, loosened(epsilon_per_study=WHOLE * 0.999)) == ["epsilon-per-study"]


def test_what_other_studies_spent_counts_against_the_data_sets_budget():
    tight = loosened(epsilon=WHOLE * 1.01)
    assert codes(PLAN, tight) == []
    case = CASE._replace(spent=[Charge(1.5, 0.1, 4)])
    assert codes(PLAN, tight, case) == ["budget"]
    with pytest.raises(RefusedError, match="enough for 4 such rounds"):
        refuse(verdict(tight, PLAN, case))


def test_an_answer_that_is_too_large_is_refused():
    assert codes(PLAN, case=CASE._replace(answer_bytes=2**20)) == []
    assert codes(PLAN, case=CASE._replace(answer_bytes=2**20 + 2**12)) == ["upload"]


def test_a_study_without_privacy_needs_a_policy_that_allows_it():
    bare = PLAN.model_copy(update={"privacy": None})
    assert codes(bare) == ["privacy"] and codes(bare, loosened(without_privacy=True)) == []
    assert charge_of(bare) is None


def test_a_plan_that_does_not_say_its_noise_is_refused():
    with pytest.raises(RefusedError, match="noise_multiplier") as error:
        verdict(POLICY, PLAN.model_copy(update=private(noise_multiplier=None)), CASE)
    assert error.value.code == "plan"


def test_noise_that_cannot_be_accounted_for_is_refused():
    rules = verdict(POLICY, PLAN.model_copy(update=private(noise_multiplier=0.1)), CASE)
    (noise,) = [rule for rule in rules if not rule.ok]
    assert (noise.code, noise.asked) == ("noise", "0.1") and rules[-1] == noise


def test_rules_that_are_not_set_allow_anything():
    plain = Policy(studies=("heart",), epsilon=8.0, delta=1e-4)
    plan = PLAN.model_copy(update=ASKED["strategy"] | ASKED["cohort"] | {"sites": ("a", "z")})
    assert codes(plan, plain) == []


@pytest.mark.parametrize("clock,inside", [("21:59", False), ("22:00", True), ("03:00", True), ("06:00", False)])
def test_hours_may_run_past_midnight(clock, inside):
    night = loosened(hours=Hours(begin="22:00", end="06:00"))
    moment = datetime.strptime(f"2026-01-01 {clock}", "%Y-%m-%d %H:%M")
    if inside:
        open_now(night, moment)
    else:
        with pytest.raises(RefusedError, match="22:00 to 06:00") as error:
            open_now(night, moment)
        assert error.value.code == "hours"
    open_now(POLICY, moment)


@pytest.mark.parametrize("field,value", [("epsilon", 0), ("delta", 1.0), ("studies", []), ("hours", {"begin": "25:00"}),
                                         ("least_noise", -1), ("max_rounds", 0), ("spending", 1)])  # fmt: skip
def test_a_policy_that_means_nothing_is_refused_by_field(field, value):
    with pytest.raises(ValidationError, match=field):
        Policy.model_validate(STRICT | {field: value})
