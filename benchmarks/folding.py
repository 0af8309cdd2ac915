"""What a coordinator's memory holds while replies come in, in copies of the model: ours, and stock Flower's FedAvg.

    python -m benchmarks.folding [--quick] [--json] [--parameters 10000000] [--replies 1000]

Ours is the coordinator's own path, with FedAvg: each reply is read from its chunks on disk, cleared of its salt, written to
one file, compared with what was agreed, and folded. Stock Flower's is ``FedAvg.aggregate_train`` over the messages that its
grid has collected, for fewer replies. Each figure is a fresh process: its greatest resident memory less what it held before
the first reply, where a copy is the model in float32.
"""

import argparse
import hashlib
import json
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from safetensors.torch import save

from fedtailor import strategies, wire
from fedtailor.leaving import Leaving, Tensor, size_limit
from fedtailor.server.folding import close_round
from fedtailor.server.listener import Bell
from fedtailor.server.memory import keep_heaps_few
from fedtailor.server.rounds import answers
from fedtailor.server.superlink import Node, Reply
from fedtailor.wire import Report, Visit

LAYERS, ROWS = 10, 10.0
FEWER = (4, 8, 16, 32)  # replies for stock Flower, which holds all of them
VISIT = Visit(run="bench", round=0, train=True, evaluate=False, baseline=False, plan="{}", cast_sha256="0" * 64)


def shapes(parameters: int) -> dict[str, tuple[int, ...]]:
    """A summand of FedAvg for a model of ``LAYERS`` equal tensors."""
    return {f"delta/{k}": (parameters // LAYERS,) for k in range(LAYERS)} | {"weight": ()}


def write_reply(folder: Path, parameters: int) -> str:
    """One reply as it lies on the coordinator's disk, a file an object: the message's id."""
    generator = torch.Generator().manual_seed(0)
    flat = {name: torch.randn(shape, generator=generator) for name, shape in shapes(parameters).items()}
    payload, salt = save(flat | {"weight": torch.tensor(ROWS)}), secrets.token_hex(32)
    digest = hashlib.sha256(payload).hexdigest()
    report = Report(run=VISIT.run, round=VISIT.round, rows=20, train_rows=10, summand_sha256=digest, salt=salt)
    content = wire.record(report, wire.salted(salt)(payload))
    message = make_message(Metadata(1, "", 1, 2, "", "", 1.0, 60.0, "train"), content)
    for name, item in get_all_nested_objects(message).items():
        (folder / name).write_bytes(item.deflate())
    return str(message.object_id)


class Disk:
    """A link on which every site has answered already: one reply on disk, read anew for each of them."""

    def __init__(self, folder: Path, root: str, replies: int) -> None:
        self.folder, self.root = folder, root
        self.known = {f"site{k}": Node(k, True, "first") for k in range(replies)}

    def nodes(self) -> Mapping[str, Node]:
        return self.known

    def push(self, nodes: list[int], ttl: float) -> dict[int, str]:
        return {node: f"question {node}" for node in nodes}

    def replies(self, run: int, waiting: set[str]) -> list[Reply]:
        return [Reply(self.root, question, None) for question in sorted(waiting)]

    def objects(self, message_id: str, most: int) -> list[str]:
        return [path.name for path in self.folder.iterdir()]

    def missing(self, ids: list[str]) -> list[str]:
        return []

    def fetch(self, run: int) -> Callable[[str], bytes]:
        return lambda name: (self.folder / name).read_bytes()

    def forget(self, asked: list[str], answers: list[str]) -> None:
        """Nothing is deleted: the next site's reply is the same."""


def fold(folder: Path, root: str, parameters: int, replies: int) -> int:
    """Fold a round as the coordinator does: bytes above idle at the peak."""
    keep_heaps_few()
    spec = {name: (torch.float32, shape) for name, shape in shapes(parameters).items()}
    tensors = tuple(Tensor(name=name, dtype="float32", shape=shape) for name, (_, shape) in sorted(spec.items()))
    leaves = Leaving(tensors=tensors, metrics=(), norm=1e9, bytes=size_limit(spec))
    link = Disk(folder, root, replies)
    with tempfile.TemporaryDirectory(dir=folder.parent) as spool:
        idle = memory("VmRSS")
        stream = answers(
            link, 1, link.push, tuple(link.known), VISIT, deadline_s=36000, limit=leaves.bytes, spool=Path(spool),
            tick=lambda: None, bell=Bell(), stop=threading.Event(),
        )  # fmt: skip
        closed = close_round(strategies.fedavg(), VISIT, leaves, stream, lambda answer: None)
        peak = memory("VmHWM")
    assert closed.acc is not None and float(closed.acc.whole("weight")) == ROWS * replies, closed.dropped
    return peak - idle


def stock(parameters: int, replies: int) -> int:
    """Aggregate ``replies`` messages as Flower's FedAvg does: bytes above idle at the peak."""
    layer, idle = torch.randn(parameters // LAYERS).numpy(), memory("VmRSS")
    messages = []
    for k in range(replies):
        arrays = ArrayRecord({str(i): Array(layer) for i in range(LAYERS)})  # each holds bytes of its own
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 10})})
        messages.append(make_message(Metadata(1, "", k + 1, 1, f"question {k}", "", 1.0, 60.0, "train"), content))
    mean, _ = FedAvg().aggregate_train(1, messages)
    assert mean is not None and len(mean) == LAYERS
    return memory("VmHWM") - idle


def memory(field: str) -> int:
    """A figure of this process in bytes: ``VmRSS`` now, ``VmHWM`` at its peak."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def measured(*arguments: str) -> dict[str, float]:
    """What one of the two said in a process of its own: bytes and seconds."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.folding", "--one", *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return {"bytes": int(done.stdout.splitlines()[-1]), "seconds": time.monotonic() - began}


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 replies at most")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--replies", type=int, default=1000)
    parser.add_argument("--one", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        kind, parameters, replies, *rest = arguments.one
        if kind == "stock":
            print(stock(int(parameters), int(replies)))
        else:
            print(fold(Path(rest[0]), rest[1], int(parameters), int(replies)))
        return
    began, size = time.monotonic(), 4 * arguments.parameters
    most, parameters = 20 if arguments.quick else arguments.replies, str(arguments.parameters)
    with tempfile.TemporaryDirectory(prefix="fedtailor-folding-") as made:
        folder = Path(made) / "transit"
        folder.mkdir()
        root = write_reply(folder, arguments.parameters)
        ours = {n: measured("ours", parameters, str(n), str(folder), root) for n in sorted({1, most // 10, most})}
    theirs = {n: measured("stock", parameters, str(n)) for n in FEWER[: 2 if arguments.quick else None]}
    if arguments.json:
        print(json.dumps({"copy_bytes": size, "fedtailor": ours, "stock": theirs}))
        return
    print(f"| {arguments.parameters:,} parameters | replies | peak above idle | copies | |\n|---|---:|---:|---:|---:|")
    for name, rows in (("fedtailor", ours), ("stock Flower's FedAvg", theirs)):
        for n, row in rows.items():
            cells = f"{row['bytes'] / 1e6:.0f} MB | {row['bytes'] / size:.2f} | {row['seconds']:.0f} s"
            print(f"| {name} | {n} | {cells} |")
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
