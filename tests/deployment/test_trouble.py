"""What goes wrong on an ordinary day: a coordinator that is down, a port that is taken, a clock that is off."""

import datetime
import json
import socket
import subprocess
import sys

import pytest
from flwr.supernode import node_auth_http_interceptor

from fedtailor.client.fleet import Fleet
from fedtailor.errors import ConnectionFailed

pytestmark = pytest.mark.deployment


@pytest.mark.slow
def test_a_site_that_starts_first_says_so_and_joins_when_the_coordinator_is_up(lay_out):
    made = lay_out("va")
    made.start("va")
    made.until(lambda: made.ask_site("va", "Status")["last_error"], 60, "the site says what is wrong")
    status = made.ask_site("va", "Status")
    assert not status["connected"] and "cannot be reached" in status["last_error"]
    made.start("server")
    made.until(lambda: made.ask_site("va", "Status")["connected"], 60, "the site joins by itself")
    assert made.finish(made.submit(made.plan("rounds=1")))["rounds"] == 1


def test_a_taken_port_is_named_with_the_way_out(lay_out):
    made = lay_out()
    config = made.server_home / "server.yaml"
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        config.write_text(config.read_text().replace(f"port: {made.port}", f"port: {port}"))
        command = [sys.executable, "-m", "fedtailor", "server", "up", "--home", str(made.server_home)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    text = " ".join(done.stderr.split())
    assert done.returncode == 1 and f"127.0.0.1:{port}" in text and "server.yaml" in text and "Traceback" not in text


@pytest.mark.slow
def test_a_second_daemon_in_one_home_is_refused(deployment):
    for room, home in (("server", deployment.server_home), ("client", deployment.site_home("va"))):
        command = [sys.executable, "-m", "fedtailor", room, "up", "--home", str(home)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1 and "another fedtailor daemon" in " ".join(done.stderr.split()), done.stderr


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_off_is_explained(deployment, monkeypatch, hours):
    late = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=hours)
    monkeypatch.setattr(node_auth_http_interceptor, "now", lambda: late)
    with pytest.raises(ConnectionFailed, match="is the clock right"):
        Fleet(f"127.0.0.1:{deployment.port}", deployment.site_home("va") / "keys").join(None)


def test_a_ledger_that_was_edited_keeps_the_site_from_starting(lay_out):
    made = lay_out("va")
    ledger = made.site_home("va") / "state" / "ledger.db"
    ledger.parent.mkdir(exist_ok=True)
    ledger.write_bytes(b"not a ledger at all" * 100)
    command = [sys.executable, "-m", "fedtailor", "client", "up", "--home", str(made.site_home("va"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    text = " ".join(done.stderr.split())
    assert done.returncode == 1 and "ledger.db" in text and "never delete it" in text and "Traceback" not in text


def test_without_a_daemon_a_question_says_how_to_start_one(lay_out):
    made = lay_out("va")
    for room, home in (("server", made.server_home), ("client", made.site_home("va"))):
        command = [sys.executable, "-m", "fedtailor", room, "status", "--home", str(home), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and json.loads(done.stdout)["error"] == "connection", done.stdout
