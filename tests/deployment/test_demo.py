"""The demo as a person runs it: without any network but loopback, and interrupted in the middle."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedtailor.result import Result

pytestmark = pytest.mark.deployment

LOOPBACK_ONLY = """
import fcntl, os, socket, struct, sys
SIOCSIFFLAGS, UP_AND_RUNNING = 0x8914, 0x41
fcntl.ioctl(socket.socket(), SIOCSIFFLAGS, struct.pack("16sh", b"lo", UP_AND_RUNNING))
os.execv(sys.executable, [sys.executable, "-m", "fedtailor", *sys.argv[1:]])
"""
REFUSING = {name: "http://127.0.0.1:9" for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")}  # nobody listens there


def cut_off():
    """How to run fedtailor with the network cut off: in a namespace of its own, or by a proxy that refuses."""
    unshare = ["unshare", "--net", "--map-root-user"]
    try:
        if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode == 0:
            return [*unshare, sys.executable, "-c", LOOPBACK_ONLY]
    except FileNotFoundError:
        pass
    return [sys.executable, "-m", "fedtailor"]


def left_over(folder):
    """Processes that still work in ``folder``."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(folder).encode() in (entry / "cmdline").read_bytes():
                found.append((entry / "cmdline").read_bytes())
        except OSError:
            pass  # it has ended meanwhile
    return found


def test_without_a_network_the_demo_runs_the_same(tmp_path):
    out = tmp_path / "demo"
    command = [*cut_off(), "demo", "rounds=3", "--out", str(out), "--json"]
    done = subprocess.run(command, env=os.environ | REFUSING, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = Result.model_validate_json((out / "result.json").read_text())
    assert result == Result.model_validate_json(done.stdout.splitlines()[-1])
    assert set(result.sites) == {"cleveland", "hungary", "switzerland", "va"} and result.rounds == 3
    assert result.transport.tls and result.transport.mutual_tls and result.transport.node_auth
    assert result.privacy.delta <= 1e-4 and "PLD" in result.privacy.accountant
    assert all(0 < site.epsilon <= 3 for site in result.sites.values())
    assert result.sites["switzerland"].metrics["federated"]["auroc"] is None
    assert all(math.isfinite(value) for m in result.metrics.values() for value in m.values())
    for name in ("events.jsonl", "model.safetensors", "model_card.md", "rounds.png", "config.yaml"):
        assert (out / name).stat().st_size > 0
    assert not left_over(out), "everything that was started is stopped"
    for log in (out / "logs").iterdir():
        assert "Traceback" not in log.read_text(), log.read_text()


@pytest.mark.slow
def test_ctrl_c_stops_everything_that_was_started(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "fedtailor", "demo", "--out", str(out)]
    demo = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    studies = out / "server" / "studies"
    end = time.monotonic() + 200
    while not (studies.exists() and list(studies.iterdir())):
        assert demo.poll() is None and time.monotonic() < end, demo.stdout.read()
        time.sleep(0.2)
    demo.send_signal(signal.SIGINT)
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130 and "Traceback" not in output, output
    assert not left_over(out)


def test_it_never_deletes_a_folder_that_is_not_its_own(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    command = [sys.executable, "-m", "fedtailor", "demo", "--out", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "choose another folder" in json.loads(done.stdout)["text"]
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
