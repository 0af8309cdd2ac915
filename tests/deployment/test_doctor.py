"""The doctor beside a daemon at work: it finds it well, and leaves it as it was."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.deployment


@pytest.mark.slow
def test_the_doctor_finds_a_running_site_well_and_does_not_disturb_it(deployment):
    home = deployment.site_home("va")
    records = home / "state" / "audit.jsonl"
    before, scratch = records.read_bytes(), (home / "state" / "work").stat().st_ino
    done = subprocess.run(
        [sys.executable, "-m", "fedtailor", "client", "doctor", "--json", "--home", str(home)],
        capture_output=True,
        text=True,
        cwd=deployment.folder,
        env={"NO_PROXY": "127.0.0.1"} | {k: v for k, v in os.environ.items() if "proxy" not in k.lower()},
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"]: row["state"] for row in json.loads(done.stdout)["rows"]}
    assert {name for name, state in rows.items() if state != "ok"} <= {
        "memory",
        "disk",
        "worker",
    }  # as this host has it
    assert rows["daemon"] == rows["records"] == "ok"
    assert records.read_bytes() == before and (home / "state" / "work").stat().st_ino == scratch
    assert deployment.ask_site("va", "Status")["connected"]
