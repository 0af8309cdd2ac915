"""Sites, a link to them, a bell and a clock, whose every step the test decides: for rounds of a coordinator."""

import hashlib
import secrets
import threading
from types import SimpleNamespace

import torch
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from safetensors.torch import save

from fedtailor import leaving, wire
from fedtailor.errors import WireError
from fedtailor.server import rounds
from fedtailor.server.rounds import answers
from fedtailor.server.superlink import Node, Reply
from fedtailor.wire import Report, Visit

SUMMAND = {"delta/w": torch.tensor([1.0, 2.0]), "weight": torch.tensor(10.0)}
SPEC = {name: (x.dtype, tuple(x.shape)) for name, x in SUMMAND.items()}
LIMIT = leaving.size_limit(SPEC)
VISIT = Visit(run="r", round=3, train=True, evaluate=False, baseline=False, plan="{}", cast_sha256="0" * 64)


def report(**changed):
    salt, digest = secrets.token_hex(32), "0" * 64
    fields = {"run": "r", "round": 3, "rows": 20, "train_rows": 10, "summand_sha256": digest, "salt": salt}
    return Report(**fields | changed)


class World:
    """A link to sites whose every step the test decides, the bell between them, and the clock."""

    def __init__(self, spool, *sites):
        self.now, self.spool, self.sites = 1000.0, spool, sites
        self.known = {site: Node(i, True, "first") for i, site in enumerate(sites)}
        self.box, self.shelf, self.trees, self.coming, self.gone = [], {}, {}, {}, set()
        self.pushed, self.forgotten, self.steps, self.ticks = [], set(), [], 0
        self.on_push = lambda site, question: None

    def leaves(self):
        tensors = [leaving.Tensor(name=n, dtype=str(d)[6:], shape=s) for n, (d, s) in SPEC.items()]
        return leaving.Leaving(tensors=tuple(tensors), metrics=(), norm=None, bytes=LIMIT)

    def digest(self):
        return hashlib.sha256(save(SUMMAND)).hexdigest()

    def nodes(self):
        return self.known

    def replies(self, run, waiting):
        assert run == 7
        found = [r for r in self.box if r.reply_to in waiting]
        self.box = [r for r in self.box if r not in found]
        return found

    def objects(self, message_id, most):
        if message_id not in self.trees:
            return None
        if len(self.trees[message_id]) > most:
            raise WireError("too many", code="oversized")
        return self.trees[message_id]

    def missing(self, ids):
        if self.gone & set(ids):
            return None
        return [one for one in ids if self.coming.get(one)]

    def fetch(self, run):
        return self.shelf.__getitem__

    def forget(self, asked, answers):
        self.forgotten |= {*asked, *answers}

    def take_answered(self):
        return True

    def listen(self, timeout):  # time passes only here
        self.now += timeout
        if self.steps:
            self.steps.pop(0)()

    def push(self, nodes, ttl):
        assert ttl > 60
        made = {}
        for node in nodes:
            if (site := self.sites[node]) not in self.known:
                continue
            made[node] = f"question {len(self.pushed)} to {site}"
            self.pushed.append(made[node])
            self.on_push(site, made[node])
        return made

    def rejoin(self, site, when, online=True):
        self.known[site] = self.known[site]._replace(activated_at=when, online=online)

    def answer(self, question, flat=SUMMAND, arrived=True, payload=None, **changed):
        said = report(**changed)
        raw = save(flat) if payload is None else payload
        record = wire.record(said, wire.salted(said.salt)(raw))
        message = make_message(Metadata(7, "", 1, 2, question, "", 1.0, 60.0, "train"), record)
        objects = {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
        self.shelf |= objects
        self.trees[message.object_id] = list(objects)
        self.coming |= {name: not arrived for name in objects}
        self.box.append(Reply(message.object_id, question, None))
        return message.object_id

    def refuse(self, question, code, lost=False):
        self.box.append(Reply(f"refusal of {question}", question, code, lost))

    def ask(self, deadline_s=20.0, limit=LIMIT, stop=None, visit=VISIT, standing=None, enough=lambda: False):
        def tick():
            self.ticks += 1

        rounds.time = SimpleNamespace(monotonic=lambda: self.now)
        return answers(
            self, 7, self.push, self.sites, visit, deadline_s=deadline_s, limit=limit, spool=self.spool, tick=tick, bell=self,
            stop=stop or threading.Event(), standing=standing, enough=enough,
        )  # fmt: skip

    def round(self, **more):
        return [(a.site, a.code) for a in self.ask(**more)]
