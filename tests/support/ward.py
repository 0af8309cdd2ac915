"""A site that was admitted by a coordinator of its own, neither of them running; and how a doctor's row is judged."""

import json
import sys
from pathlib import Path

import yaml

from fedtailor.cli.rehearsal import admit
from fedtailor.client.doctor import Site
from fedtailor.client.finding import tried
from fedtailor.client.joining import Settings
from fedtailor.client.site import Home
from fedtailor.client.workshop import Workshop
from fedtailor.datasets import heart_disease, write_csv
from fedtailor.server import home as server

POLICY = ("epsilon", "task_memory_mb", "max_download_mb", "studies", "plugins")


def admitted(folder: Path, hub: server.Home | None = None) -> Path:
    """A site with Cleveland's data below ``folder``, admitted by ``hub`` or by one that does not run; its home."""
    if hub is None:
        hub = server.Home(folder / "hub")
        hub.init(server.ServerConfig(name="test", hosts=("127.0.0.1", "localhost")))
    write_csv(heart_disease()["cleveland"].table(), folder / "data.csv")
    admit(hub, "a", folder / "a", Settings(folder / "data.csv", ["heart"], 3.0, 1e-4))
    return folder / "a"


def change(folder: Path, **to) -> Site:
    """Change site.yaml: fields of its own, or of the policy."""
    raw = yaml.safe_load((folder / "site.yaml").read_text())
    policy = {name: to.pop(name) for name in POLICY if name in to}
    (folder / "site.yaml").write_text(yaml.safe_dump(raw | to | {"policy": raw["policy"] | policy}))
    return Site(Home(folder), Home(folder).config(), None)


def only(check):
    """The one row of a check, as the doctor would show it."""
    rows = tried("x", check)
    assert len(rows) == 1, rows
    return rows[0]


def bad(row, *words, state="wrong"):
    """That a row is no good, and says these words of what was found or how to mend it."""
    assert row.state == state, row
    assert all(word in f"{row.found} | {row.mend}" for word in words), row


def worker(monkeypatch, *lines):
    """Let the training process be a program that answers with these documents, one a request, and ends."""
    said = [json.dumps(line) for line in lines]
    code = f"import sys\nfor line in {said!r}: sys.stdin.readline(); print(line, flush=True)\nsys.exit('gone')"
    monkeypatch.setattr(Workshop, "_command", lambda self: [sys.executable, "-c", code])
