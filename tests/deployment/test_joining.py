"""Joining by the commands that people type, against a running coordinator."""

import io
import json
import sys

import pytest

from fedtailor.cli import main

pytestmark = pytest.mark.deployment


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command as its process would, in this one."""

    def run(*arguments, answer=""):
        monkeypatch.setattr(sys, "argv", ["fedtailor", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, " ".join(said.err.split())

    return run


def test_a_site_is_invited_asks_is_compared_approved_and_at_work(deployment, command, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    hub, home = ["--home", deployment.server_home, "--json"], tmp_path / "site"
    out, data = tmp_path / "hungary.txt", deployment.folder / "va.csv"

    seen = []  # the CA's fingerprint, as the operator reads it

    def listed():
        code, text, _ = command("server", "sites", *hub)
        assert code == 0
        seen.append(json.loads(text)["ca"])
        return {row["site"]: row for row in json.loads(text)["sites"]}

    code, text, _ = command("server", "invite", "hungary", "--hours", "1", "--out", out, *hub)
    assert code == 0 and json.loads(text)["invitation"] == str(out) and out.stat().st_mode & 0o777 == 0o600
    rows = listed()
    assert rows["hungary"]["state"] == "invited" and rows["hungary"]["connected"] is None
    assert rows["va"]["state"] == "admitted"
    deployment.until(lambda: listed()["va"]["connected"], 60, "va is back")  # other tests may have cut it off just now
    join = ["client", "join", f"https://127.0.0.1:{deployment.port}", "--invitation", "-", "--home", home, "--json"]
    settings = ["--data", data, "--study", "heart", "--epsilon", "3"]
    code, text, err = command(*join, *settings, "--no-wait", answer=f"pasted:\n{out.read_text()}")
    assert code == 0 and json.loads(text)["status"] == "waiting"
    row = listed()["hungary"]
    assert row["state"] == "waiting" and row["fingerprint"] in err and seen[0] in err and "telephone" in err
    wrong = "0000 " * 16
    code, text, _ = command("server", "approve", "hungary", "--fingerprint", wrong, *hub)
    assert code == 2 and json.loads(text)["error"] == "fingerprint"
    assert command("server", "approve", "hungary", *hub)[0] == 2, "without a question and without an answer"
    refused = command("server", "approve", "hungary", "--home", deployment.server_home, answer="n\n")
    assert refused[0] == 1 and row["fingerprint"] in refused[1] and listed()["hungary"]["state"] == "waiting"
    assert command("server", "approve", "hungary", "--fingerprint", row["fingerprint"], *hub)[0] == 0
    code, text, _ = command("client", "join", "--home", home, "--json")
    assert code == 0 and json.loads(text)["status"] == "admitted" and json.loads(text)["site"] == "hungary"
    assert {p.name for p in (home / "keys").iterdir()} == {"ca.pem", "plans.pub", "site.key", "site.pem"}
    assert not (home / "joining").exists() and listed()["hungary"]["state"] == "admitted"
    code, _, err = command(*join, *settings, answer=out.read_text())
    assert code == 2 and "site.yaml exists" in err
    assert command("server", "revoke", "hungary", *hub)[0] == 0 and listed()["hungary"]["state"] == "revoked"
    assert command("server", "revoke", "hungary", *hub)[0] == command("server", "deny", "hungary", *hub)[0] == 2
    assert command("server", "sites", "--home", deployment.server_home)[0] == 0, "and in a table"
