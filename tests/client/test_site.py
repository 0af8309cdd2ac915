"""A site's own rules: no policy, no work; what is wrong is named."""

import re
import stat
from pathlib import Path

import pytest
import yaml

from fedtailor.client.site import Home, SiteConfig
from fedtailor.errors import ConfigError
from fedtailor.policy import Policy

RAW = {
    "site": "a",
    "server": "hub.example:8443",
    "data": {"name": "heart", "path": "data.csv"},
    "policy": {"studies": ["heart", "other"], "epsilon": 8.0, "delta": 1e-4, "max_rounds": 20},
}
# --- site.yaml ---


def home(tmp_path, **changed):
    raw = {k: v for k, v in (RAW | changed).items() if v is not None}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(raw))
    return Home(tmp_path)


def test_paths_are_the_homes_own(tmp_path):
    config = home(tmp_path).config()
    assert (config.keys, config.data.path) == (tmp_path / "keys", tmp_path / "data.csv")
    elsewhere = home(tmp_path, data={"name": "heart", "path": "/srv/data.csv"}).config()
    assert str(elsewhere.data.path) == "/srv/data.csv"
    assert config.policy == Policy(studies=("heart", "other"), epsilon=8.0, delta=1e-4, max_rounds=20)


@pytest.mark.parametrize("policy", [None, {}, [], ""])
def test_a_site_without_a_policy_does_not_start(tmp_path, policy):
    with pytest.raises(ConfigError, match="policy is missing; a site without a policy refuses everything"):
        home(tmp_path, policy=policy).config()


WRONG = {
    "policy.epsilon": {"policy": RAW["policy"] | {"epsilon": 0}},
    "policy.delta": {"policy": RAW["policy"] | {"delta": 0.5}},
    "policy.studies": {"policy": RAW["policy"] | {"studies": []}},
    "policy.studies.0": {"policy": RAW["policy"] | {"studies": ["Not a name"]}},
    "policy.max_rounds": {"policy": RAW["policy"] | {"max_rounds": -1}},
    "policy.minimum_count": {"policy": RAW["policy"] | {"minimum_count": 0}},
    "policy.extra": {"policy": RAW["policy"] | {"extra": 1}},
    "site": {"site": "../a"},
    "server": {"server": "https://hub.example"},
    "data": {"data": None},
    "data.name": {"data": {"name": "A B", "path": "x"}},
    "threads": {"threads": "many"},
    "thread": {"thread": 1},
}


@pytest.mark.parametrize("field", WRONG)
def test_what_is_wrong_in_site_yaml_is_named(tmp_path, field):
    with pytest.raises(ConfigError) as error:
        home(tmp_path, **WRONG[field]).config()
    assert f"site.yaml: {field}: " in str(error.value)


def test_nothing_of_a_policy_is_assumed():
    fields = Policy.model_fields
    assert all(fields[name].is_required() for name in ("studies", "epsilon", "delta"))
    assert fields["without_privacy"].default is False


@pytest.mark.parametrize("text", [None, b"", b"{", b"- a list", b"7", "name: Universität".encode("latin-1")])
def test_a_site_yaml_that_cannot_be_read_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "site.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match="site.yaml"):
        Home(tmp_path).config()


def test_the_state_is_its_owners_alone(tmp_path):
    it = Home(tmp_path / "site")
    it.make()
    it.make()  # again, at the next start
    for folder in (it.folder, it.state, it.inbox, it.outbox, it.memory):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_site_yaml_in_the_guide_is_one():
    guide = (Path(__file__).parents[2] / "docs" / "sites.md").read_text(encoding="utf-8")
    shown = re.search(r"```yaml\n(site: va.*?)```", guide, re.DOTALL)
    config = SiteConfig.model_validate(yaml.safe_load(shown[1]))
    assert set(config.policy.model_fields_set) == set(Policy.model_fields), "the guide shows every rule there is"
