"""Plug-ins: found without being run, named exactly, hashed whole, and imported only where they may be."""

import json
import sys

import plugged
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from fedtailor import Strategy, plugins, proposal
from fedtailor.cli import app
from fedtailor.config import build, choices, load
from fedtailor.errors import ConfigError, RefusedError
from fedtailor.policy import Policy, judge_plugins
from fedtailor.recipe import Recipe
from fedtailor.simulations import policies
from fedtailor.study import Spec


@pytest.fixture
def folder(tmp_path):
    with plugged.folder(tmp_path / "it's, [here] é") as made:
        yield made


def made(target, kind=Strategy, **arguments):
    return build(Spec.model_validate({"_target_": target} | arguments), kind)


def plan(*overrides):
    return load(["study=heart", "privacy=none", "sites=[a,b]", "quorum=1", *overrides]).plan


# --- found, and named ---


def test_looking_imports_nothing_and_naming_does(folder):
    folder.install("plug_a", entry="first = plug_a")
    (found,) = plugins.installed()
    assert found.code()[:2] == ("first", "1.0") and found.adds() == {"strategy": ["plug_a"]}
    assert "plug_a" in choices("strategy") and plugins.of(plan("strategy=plug_a")) == [found]
    assert plan("strategy=plug_a", "strategy.server_lr=2").strategy.model_extra == {"server_lr": 2}
    assert CliRunner().invoke(app, ["plugins"]).exit_code == 0
    assert not folder.imported and "plug_a" not in sys.modules
    assert isinstance(build(plan("strategy=plug_a").strategy, Strategy), Strategy)
    assert folder.imported


def test_a_module_within_a_package_is_found_without_importing_the_package(folder):
    folder.install(
        "plug_b", entry="b = plug_b.inner.deep", plug_b__inner____init__="", plug_b__inner__deep=plugged.MODULE
    )
    (found,) = plugins.installed()
    assert found.file == folder.path / "plug_b" / "inner" / "deep.py" and "plug_b" not in sys.modules
    assert isinstance(made("plug_b.inner.deep.mine"), Strategy)


def test_studies_and_recipes_may_be_added(folder):
    recipe = "from fedtailor import recipes, Strategy\nfrom fedtailor.recipe import Recipe\ndef table() -> Recipe:\n    return recipes.tabular('heart')\n"
    study = "# @package _global_\ndefaults:\n  - override /recipe: plug_c\n  - override /privacy: none\n  - override /simulation: heart\nstudy: lungs\nrounds: 1\nsites: [va]\nquorum: 1\ndeadline_s: 9\nlocal: {steps: 1, rate: 0.5, lr: 0.1}\n"
    folder.install("plug_c", recipe, yaml={"recipe/plug_c": "_target_: plug_c.table\n", "study/lungs": study})
    composed = load(["study=lungs"]).plan
    assert composed.study == "lungs" and isinstance(build(composed.recipe, Recipe), Recipe)
    assert [one.name for one in plugins.of(composed)] == ["plug_c"]


ODD = (
    plugged.MODULE
    + """
import plug_d.other
class Made(Strategy): ...
def bare(): return fedavg()
def wrong() -> dict: return {}
def lost() -> "Nowhere": return fedavg()
def _hidden() -> Strategy: return fedavg()
alias = fedavg
value = fedavg()
def lies() -> Strategy: return 7
def fails() -> Strategy: return {}["x"]
"""
)


@pytest.mark.parametrize(
    ("target", "words", "imports"),
    [
        ("os.system", "outside the trusted modules", False),
        ("plug_d.other.mine", "outside the trusted modules", False),  # of its package, but not its module
        ("plug_d.os.system", "outside the trusted modules", False),
        ("plug_d.mine.__globals__", "outside the trusted modules", False),
        ("plug_dd.mine", "outside the trusted modules", False),
        ("plug", "outside the trusted modules", False),
        ("plug_d.fedavg", "has the name of fedtailor.strategies.fedavg", False),
        ("plug_d.heart_disease", "has the name of fedtailor.datasets.heart_disease", False),
        ("plug_d.Made", "no such factory", True),
        ("plug_d.bare", "no such factory", True),
        ("plug_d.wrong", "no such factory", True),
        ("plug_d.lost", "no such factory", True),
        ("plug_d._hidden", "no such factory", True),
        ("plug_d.alias", "no such factory", True),
        ("plug_d.value", "no such factory", True),
        ("plug_d.os", "no such factory", True),
        ("plug_d.none", r"no such factory, .* it has fails, lies, mine", True),
        ("plug_d.lies", "made a int, not a Strategy", True),
        ("plug_d.fails", "plug_d.fails: 'x'", True),
    ],
)
def test_only_a_factory_of_exactly_that_module_may_be_named(folder, target, words, imports):
    folder.install("plug_d", ODD, plug_d__other=plugged.MODULE)
    with pytest.raises(ConfigError, match=words):
        made(target)
    assert folder.imported == imports
    assert isinstance(made("plug_d.mine", server_lr=2), Strategy)


def test_arguments_of_a_plugin_are_data_and_named_when_wrong(folder):
    folder.install("plug_e")
    with pytest.raises(ConfigError, match=r"plug_e.mine: server_lr: .*-1"):
        made("plug_e.mine", server_lr=-1)
    with pytest.raises(ConfigError, match="arguments are data"):
        made("plug_e.mine", server_lr={"_target_": "os.getpid"})
    with pytest.raises(ConfigError, match="made a Strategy, not a Recipe"):
        made("plug_e.mine", Recipe)


@pytest.mark.parametrize("code", ["import nothing_like_it", "def (", "raise SystemExit", "1 / 0"])
def test_a_module_that_cannot_be_imported_is_named(folder, code):
    folder.install("plug_f", code)
    with pytest.raises(ConfigError, match="plug-in plug_f 1.0: importing plug_f fails: "):
        made("plug_f.mine")


# --- collisions, and what is malformed ---


def test_a_choice_that_ships_cannot_be_taken(folder):
    folder.install("plug_g", yaml={"strategy/fedavg": "_target_: plug_g.mine\n"})
    with pytest.raises(
        ConfigError, match=r"strategy=fedavg is offered by fedtailor itself and by plug-in plug_g \(plug_g 1.0\)"
    ):
        load(["study=heart"])


def test_two_plugins_cannot_offer_one_choice_or_one_module(folder):
    folder.install("plug_h", yaml={"strategy/same": "_target_: plug_h.mine\n"})
    folder.install("plug_i", yaml={"strategy/same": "_target_: plug_i.mine\n"})
    with pytest.raises(ConfigError, match=r"strategy=same is offered by plug-in plug_. .* and by plug-in plug_"):
        load(["strategy=same"])
    folder.install("plug_j", entry="j = plug_h")
    with pytest.raises(ConfigError, match=r"of plug_. 1.0 and .* of plug_. 1.0 name one module, plug_h"):
        made("plug_h.mine")
    assert not folder.imported


@pytest.mark.parametrize(
    "path", ["privacy/none", "config", "strategy/deep/x", "hydra/job_logging/default", "strategy/Ünicode"]
)
def test_yaml_in_another_place_is_refused(folder, path):
    folder.install("plug_k", yaml={path: "x: 1\n"})
    with pytest.raises(ConfigError, match="adds nothing; a plug-in's YAML is configs/GROUP/NAME.yaml"):
        load()


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("x = plug_l:mine", "is malformed"),
        ("X = plug_l", "is malformed"),
        ("x = fedtailor.strategies.krum", "is malformed"),
        ("x = plug-l", "is malformed"),
        ("x = plug_l.nowhere", "is not found as a file in a package"),
        ("x = nowhere.at_all", "is not found as a file in a package"),
        ("x = alone", "is not found as a file in a package"),
        ("x = os", "is not found as a file in a package"),
        ("x = sys", "is not found as a file in a package"),
        ("x = plug_l.configs", "is not found as a file in a package"),
    ],
)
def test_an_entry_that_leads_nowhere_is_named(folder, entry, words):
    folder.install("plug_l", entry=entry, alone="")
    with pytest.raises(ConfigError, match=words) as error:
        load()
    assert "plug_l 1.0" in str(error.value)
    listed = json.loads(CliRunner().invoke(app, ["plugins", "--json"]).stdout)["plugins"]
    assert [row["problem"] for row in listed] == [str(error.value)]
    assert isinstance(made("fedtailor.strategies.fedavg"), Strategy)  # what ships does not depend on it


# --- a study that runs one ---


def proposed(of):
    keys = {site: ec.generate_private_key(ec.SECP384R1()).public_key() for site in of.sites}
    return proposal.propose(of, "r", keys)


def test_a_proposal_names_the_code_that_it_runs(folder):
    package = folder.install("plug_t", entry="t = plug_t")
    of = proposed(plan("strategy=plug_t"))
    assert of.code["plugin:t"] == plugins.installed()[0].sha256()
    proposal.installed(of)
    assert proposal.third_party(of) == [plugins.installed()[0].code()]
    folder.forget()
    (package / "__init__.py").write_text(plugged.MODULE + "\n")
    with pytest.raises(RefusedError, match="plugin:t is not what is installed here") as error:
        proposal.installed(of)
    assert error.value.code == "code"
    assert not any(key.startswith("plugin:") for key in proposed(plan()).code)


def test_a_policy_approves_by_name_and_hash(folder):
    folder.install("plug_u")
    code = plugins.installed()[0].code()
    for approved, words in (({}, "then add the line"), ({"plug_u": "0" * 64}, "it has changed since")):
        (rule,) = judge_plugins(approved, [code])
        assert not rule.ok and rule.code == "plugin" and words in rule.allowed and code.sha256 in rule.asked
    (rule,) = judge_plugins({"plug_u": ""}, [plugins.Code("plug_u")])
    assert not rule.ok and "not installed here" in rule.asked and "ask the operator for the package" in rule.allowed
    assert [rule.ok for rule in judge_plugins({"plug_u": code.sha256}, [code])] == [True]


def test_a_simulation_asks_the_sites_about_it(folder):
    folder.install("plug_v")
    base = Policy(studies=("heart",), epsilon=1.0, delta=1e-4, without_privacy=True)
    knows = base.model_copy(update={"plugins": {"plug_v": plugins.installed()[0].sha256()}})
    gate = policies.admit(plan("strategy=plug_v"), {"a": base, "b": knows})
    assert gate.dropped == [{"round": 0, "site": "a", "code": "plugin"}] and gate.plan.sites == ("b",)
    assert policies.admit(plan(), {"a": base, "b": base}).dropped == []


def test_the_list_is_what_a_policy_takes(folder):
    import yaml

    folder.install("plug_w", entry="w.x-1 = plug_w")
    shown = CliRunner().invoke(app, ["plugins"]).stdout
    assert "w.x-1: plug_w 1.0, module plug_w, adds strategy=plug_w" in shown
    text = shown[shown.index("policy:") :]
    policy = Policy.model_validate(yaml.safe_load(text)["policy"] | {"studies": ["s"], "epsilon": 1, "delta": 0.01})
    assert policy.plugins == {"w.x-1": plugins.installed()[0].sha256()}
