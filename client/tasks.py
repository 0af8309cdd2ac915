"""What the training process does for the daemon: describe the site's data, and run visits on them."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata

from fedtailor import plugins, store, wire
from fedtailor.client.app import client_app
from fedtailor.client.work import Work, perform
from fedtailor.config import build
from fedtailor.errors import ContractError
from fedtailor.recipe import Dataset, Recipe
from fedtailor.sources import CsvSource
from fedtailor.study import Spec
from fedtailor.tree import Tree
from fedtailor.wire import Visit


class Tasks:
    """Answers the daemon's requests; holds the prepared data."""

    def __init__(self, start: dict[str, Any]) -> None:
        plugins.only(start["plugins"])
        self.site: str = start["site"]
        self.source = CsvSource(Path(start["rules"]["data"]))
        self.minimum: int = start["minimum"]
        torch.set_num_threads(start["threads"])
        self.data: dict[str, tuple[tuple[int, int], Dataset]] = {}  # recipe -> (the file's time and size), data
        self.operations = {"describe": self.describe, "visit": self.visit}

    def dataset(self, recipe: dict[str, Any]) -> Dataset:
        """The site's data as ``recipe`` prepares them; read again when the file has changed."""
        name = json.dumps(recipe, sort_keys=True)
        try:
            info = self.source.path.stat()
        except OSError as error:
            raise ContractError(f"data: cannot read {self.source.path}: {error.strerror}") from error
        stamp = (info.st_mtime_ns, info.st_size)
        if name not in self.data or self.data[name][0] != stamp:
            built = build(Spec.model_validate(recipe), Recipe)
            self.data[name] = (stamp, built.prepare(self.source.table()))
        return self.data[name][1]

    def warm(self) -> None:
        """Import what every visit needs, before the first one comes."""
        import fedtailor.recipes
        import fedtailor.strategies  # noqa: F401

    def describe(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the ledger needs to know of the data."""
        data = self.dataset(request["recipe"])
        return {
            "fingerprint": data.fingerprint,
            "rows": data.rows,
            "train_rows": len(data.train.y),
            "test_rows": len(data.test.y),
            "notes": list(data.notes),
        }

    def visit(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run one visit through the ClientApp; the outcome is written into ``out``."""
        entry, out = Path(request["entry"]), Path(request["out"])
        key = bytes.fromhex(request["key"]) if request["key"] else None
        head = wire.parse_head(Visit, (entry / "head.json").read_text())
        data = self.dataset(json.loads(head.plan)["recipe"])
        memory: Tree = store.load_tree(Path(request["memory"]))[0] if request["memory"] else {}
        kept: list[Work] = []

        def performed(visit: Visit, cast: Tree, *_: object) -> Work:
            kept.append(perform(visit, cast, data, memory, site=self.site, key=key, minimum=self.minimum))
            return kept[0]

        content = wire.record(head, (entry / "payload.safetensors").read_bytes())
        meta = Metadata(1, entry.name, 1, 2, "", "", time.time(), 3600.0, "train")
        context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
        reply = client_app(performed)(make_message(meta, content), context)
        shutil.rmtree(out, ignore_errors=True)  # of a worker that died here
        out.mkdir(mode=0o700, parents=True)
        if kept[0].memory:
            store.save_tree(out / "memory.safetensors", kept[0].memory, {})
        if kept[0].model:
            store.save_tree(out / "model.safetensors", kept[0].model, {})
        report, summand = wire.unpacked(reply.content)
        (out / "summand.safetensors").write_bytes(summand)  # scratch: what leaves, the airlock makes durable
        store.write_text(out / "work.json", report)
        return {}
