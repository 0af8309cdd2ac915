"""Every YAML that ships composes, validates and builds; what is wrong is named, with the way out."""

import pytest

from fedtailor import Strategy
from fedtailor.config import build, choices, groups, load, shipped
from fedtailor.contract import load_contract
from fedtailor.errors import ConfigError
from fedtailor.recipe import Recipe
from fedtailor.study import Plan, Spec

COMPOSED = [(group, choice) for group in groups() if group != "contract" for choice in choices(group)]


@pytest.mark.parametrize(("group", "choice"), COMPOSED)
def test_every_choice_composes_and_builds(group, choice):
    plan, simulation = load([f"{group}={choice}"])
    assert isinstance(build(plan.strategy, Strategy), Strategy)
    assert isinstance(build(plan.recipe, Recipe), Recipe)
    assert simulation.data.target.startswith("fedtailor.")


@pytest.mark.parametrize("name", choices("contract"))
def test_every_contract_loads(name):
    assert load_contract(name).name == name


@pytest.mark.parametrize("name", shipped("strategy"))
def test_a_strategy_is_named_like_its_file(name):
    assert load([f"strategy={name}"]).plan.strategy.target == f"fedtailor.strategies.{name}"


def test_a_plan_survives_its_canonical_text():
    plan = load().plan
    assert Plan.parse(plan.canonical()) == plan
    assert Plan.parse(plan.canonical()).digest() == plan.digest()
    assert load(["rounds=21"]).plan.digest() != plan.digest()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("strategy=fedprx", ["strategy=fedprx", "did you mean 'fedprox'"]),
        ("privacy=recrd", ["privacy=recrd", "did you mean 'record'"]),
        ("study=hart", ["study=hart", "did you mean 'heart'"]),
        ("strategy=nothing_like_it", ["nothing_like_it", "there are", "fedavg"]),
        ("+round=3", ["round:", "did you mean 'rounds'"]),
        ("+momentum=0.9", ["momentum"]),
        ("+local.stepz=3", ["local.stepz"]),
        ("roundz=3", ["roundz"]),
        ("rounds=0", ["rounds", "greater than or equal to 1", "got 0"]),
        ("rounds=many", ["rounds", "integer", "many"]),
        ("local.rate=1.5", ["local.rate", "1.5"]),
        ("privacy.delta=0.5", ["privacy.delta", "0.5"]),
        ("quorum=5", ["quorum", "4 sites"]),
        ("sites=[va,va]", ["sites", "twice"]),
        ("sites=[../va]", ["sites", "../va"]),
        ("study=[", ["["]),
    ],
)
def test_what_is_wrong_is_named(override, words):
    with pytest.raises(ConfigError) as caught:
        load([override])
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_bad_argument_of_a_recipe_is_named():
    with pytest.raises(ConfigError, match=r"tabular: model: .*'forest'"):
        build(load(["recipe.model=forest"]).plan.recipe, Recipe)
    with pytest.raises(ConfigError, match="did you mean 'heart'"):
        build(load(["recipe.contract=hart"]).plan.recipe, Recipe)


@pytest.mark.parametrize("target", ["shutil.rmtree", "os.system", "fedtailor_evil.strategy", "builtins.eval", "len"])
def test_a_target_outside_the_trusted_modules_is_refused_before_it_is_imported(target):
    with pytest.raises(ConfigError, match="outside the trusted") as caught:
        build(Spec.model_validate({"_target_": target, "path": "/nowhere"}), Strategy)
    assert caught.value.code == "untrusted"


@pytest.mark.parametrize("way", ["nested", "deeply nested", "through a module", "through a factory's module"])
def test_a_plan_cannot_smuggle_a_call(tmp_path, way):
    """A plan comes from the hub: what it names must be a factory of ours, not anything that can be reached from one."""
    witness = tmp_path / "called"
    call = {"_target_": "os.makedirs", "name": str(witness)}
    spec = {"_target_": "fedtailor.strategies.fedavg", "server_lr": call}
    if way == "deeply nested":
        spec["server_lr"] = [{"lr": call}]
    if way == "through a module":
        spec = call | {"_target_": "fedtailor.airgap.os.makedirs"}
    if way == "through a factory's module":
        spec = call | {"_target_": "fedtailor.datasets.store.os.makedirs"}
    with pytest.raises(ConfigError):
        build(Spec.model_validate(spec), Strategy)
    assert not witness.exists()


@pytest.mark.parametrize("name", ["fedavgg", "__doc__", "import_module"])
def test_a_name_that_a_trusted_module_does_not_offer_is_refused(name):
    with pytest.raises(ConfigError, match="no such factory") as caught:
        build(Spec.model_validate({"_target_": f"fedtailor.strategies.{name}"}), Strategy)
    assert caught.value.code == "unknown"


def test_a_factory_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="made a Strategy, not a Recipe"):
        build(load().plan.strategy, Recipe)
