"""The installed Flower ClientApp: one visit per message.

A site's worker runs :func:`client_app`; nothing that a server sends replaces it. ``app`` is for a researcher's plain
``flwr run``: it has no policy, ledger or airlock, and takes every site's data from where the simulator does.
"""

import hashlib
import os
from collections.abc import Callable
from functools import lru_cache

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from safetensors.torch import load, save

from fedtailor import tree, wire
from fedtailor.client.work import Work, perform, prepared
from fedtailor.config import build
from fedtailor.policy import charge_of
from fedtailor.privacy.accounting import epsilon
from fedtailor.recipe import Dataset
from fedtailor.study import Spec
from fedtailor.tree import Tree
from fedtailor.wire import Visit

Perform = Callable[[Visit, Tree, Message, Context], Work]


def client_app(perform: Perform) -> ClientApp:
    """A ClientApp around what this site does in a visit."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        head, payload = wire.unpacked(message.content)
        work = perform(wire.parse_head(Visit, head), tree.unflatten(load(payload)), message, context)
        payload = to_bytes(work.summand)
        report = work.report.model_copy(update={"summand_sha256": hashlib.sha256(payload).hexdigest()})
        return Message(wire.record(report, payload), reply_to=message)

    return app


def to_bytes(of: Tree) -> bytes:
    """A tree as a safetensors file."""
    return save({name: leaf.contiguous() for name, leaf in tree.flatten(of).items()})


@lru_cache(maxsize=64)
def _dataset(plan: str, source: str, site: str) -> Dataset:
    sources = build(Spec.model_validate_json(source), dict)
    return prepared(plan)[1].prepare(sources[site].table())


def _research(visit: Visit, cast: Tree, message: Message, context: Context) -> Work:
    asked = message.content.config_records["research"]
    data = _dataset(visit.plan, str(asked["source"]), str(asked["site"]))
    kept = context.state.array_records.get("memory")
    memory: Tree = tree.unflatten(load(kept[wire.STYPE].data)) if kept else {}
    work = perform(visit, cast, data, memory, site=str(asked["site"]), key=os.urandom(32))
    plan = prepared(visit.plan)[0]
    if plan.record is not None and (charge := charge_of(plan)) is not None:  # nobody else keeps account here
        spent = epsilon([charge] * (visit.round + visit.train), plan.record.delta)
        work = work._replace(report=work.report.model_copy(update={"epsilon": spent}))
    if visit.train:
        context.state["memory"] = wire.packed(to_bytes(work.memory))
    return work


app = client_app(_research)
