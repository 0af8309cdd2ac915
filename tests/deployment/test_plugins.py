"""A study that runs third-party code, between real processes: it runs where it was approved, and nowhere else."""

import json

import plugged
import pytest
import yaml

from fedtailor import control, plugins
from fedtailor.errors import RefusedError

pytestmark = [pytest.mark.deployment, pytest.mark.slow]


@pytest.fixture
def folder(tmp_path):
    with plugged.folder(tmp_path / "installed") as made:
        made.install("plug")
        yield made


def test_a_plugin_runs_where_it_is_approved_only(folder, lay_out):
    deployment = lay_out("cleveland", "va")
    path = deployment.site_home("cleveland") / "site.yaml"
    raw = yaml.safe_load(path.read_text())
    raw["policy"]["plugins"] = {"plug": plugins.installed()[0].sha256()}
    path.write_text(yaml.safe_dump(raw))
    deployment.start_all()
    run = deployment.submit(deployment.plan("privacy=none", "strategy=plug", "rounds=2", "quorum=1"))
    result = deployment.finish(run)
    assert result["strategy"] == "mine" and result["sites"].keys() == {"cleveland"}
    events = [json.loads(line) for line in (deployment.run_folder(run) / "events.jsonl").read_text().splitlines()]
    said = {event["site"]: event["code"] for event in events if event["kind"] == "proposal"}
    assert said == {"cleveland": None, "va": "plugin"}
    logs = {site: [deployment.folder / f"{site}.log", deployment.site_home(site) / "state" / "worker.log"]
            for site in deployment.sites}  # fmt: skip
    ran = {site: ["HERE I AM" in path.read_text() for path in paths] for site, paths in logs.items()}
    assert ran == {"cleveland": [True, True], "va": [False, False]}
    (row,) = deployment.ask_site("va", "Plans")["rows"]
    with pytest.raises(RefusedError, match="third-party code: the plan asks plug 1.0") as error:
        control.call(control.socket_of(deployment.site_home("va")), "Site", "Check", {"plan": row["hash"]})
    assert error.value.code == "plugin"
