"""A deployed site's training process: what confines it is said, and a visit that passes a limit costs that visit only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedtailor.client import landlock

pytestmark = pytest.mark.deployment


@pytest.mark.slow  # tests/attacks/test_worker_limits.py tries the limits themselves
def test_a_visit_that_takes_too_long_is_declined_and_the_next_one_is_done(lay_out):
    site = lay_out("va")
    path = site.site_home("va") / "site.yaml"
    path.write_text(path.read_text().replace("policy:\n", "policy:\n  task_seconds: 20\n"))
    site.start_all()
    log = site.folder / "va.log"
    run = site.submit(site.plan("rounds=1", "privacy=none", "local.steps=10000", "recipe=heart_mlp",
                                "recipe.hidden=5000", "local.rate=1.0"))  # fmt: skip
    site.until(lambda: site.status(run)["status"] == "failed", 120, "the run ends without its only site")
    assert "va: time" in site.status(run)["detail"], "the coordinator learns the code, and no more"
    text = log.read_text()
    assert "refused (time): the training process was ended during visit: it took longer than 20 s" in text
    assert "policy.task_seconds" in text and "try 1 of 3" not in text
    answers = [json.loads(p.read_text()) for p in (site.site_home("va") / "state" / "outbox").glob("*/visit.json")]
    assert [one["listed"] for one in answers] == [{"agreed": True}], "it agreed, and nothing else is there to leave"
    before = text.count("training process: network")
    assert site.finish(site.submit(site.plan("rounds=2", "privacy=none")))["rounds"] == 2
    assert log.read_text().count("training process: network") == before == 1, "what is in force is said once"


def test_what_confines_it_is_shown_and_true(deployment):
    status = deployment.ask_site("va", "Status")
    found, pid = status["confinement"], status["worker_pid"]
    assert found["task_seconds"] == 3600 and found["files"] == landlock.abi()
    own = os.readlink("/proc/self/ns/net")
    assert (os.readlink(f"/proc/{pid}/ns/net") != own) == (found["network"] in ("both", "namespace"))
    state = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert (state["Seccomp"] == "2") == found["processes"] and (state["NoNewPrivs"] == "0") == found["new_privileges"]
    command = [sys.executable, "-m", "fedtailor", "client", "status", "--home", str(deployment.site_home("va"))]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "worker: network" in shown and "3600 s a task" in " ".join(shown.split())
    line = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout
    assert json.loads(line)["confinement"] == found
