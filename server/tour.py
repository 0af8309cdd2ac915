"""Visits to all sites of one run: the proposal first, then a visit a round; what is asked, shown and brought back."""

import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtailor import store, tree, wire
from fedtailor.errors import ConfigError
from fedtailor.events import Events
from fedtailor.server import slicewise
from fedtailor.server.folding import Closed, close_round
from fedtailor.server.listener import Bell
from fedtailor.server.record import Progress
from fedtailor.server.rounds import Answer, Flag, Standing, answers
from fedtailor.server.runs import Run
from fedtailor.server.superlink import SuperLink
from fedtailor.server.vouching import Heads, Last, Vouch, last_of, lasts_from
from fedtailor.strategy import Strategy
from fedtailor.study import Plan
from fedtailor.tree import Tree
from fedtailor.treefile import Excerpt
from fedtailor.wire import Report, Visit

PROPOSAL_S = 10.0  # for the sites that are there to answer a proposal
ASK_AGAIN_S = 1.0  # of those who have not decided, at first
SELDOM_S = 30.0  # and when they have not for long
NOTHING = b"".join(store.safetensors({}))  # what is cast where nothing is asked


class Setting(NamedTuple):
    """What a run is executed with."""

    superlink: SuperLink
    bell: Bell
    key: Ed25519PrivateKey  # signs proposals, visits and receipts
    heads: Heads
    transport: dict[str, bool]
    stop: threading.Event  # a person asked to end the study; what is learnt so far is kept
    halt: threading.Event  # the process is ending; the run resumes when it starts again
    watch: Callable[[dict[str, Any]], None]  # is told every event


class Tour:
    """Visits to all sites of one run, over one Flower run."""

    def __init__(
        self, run: Run, plan: Plan, strategy: Strategy, setting: Setting, events: Events, ear: Bell | None = None
    ) -> None:
        self.run, self.plan, self.strategy = run, plan, strategy
        self.setting, self.events = setting, events
        self.ear = ear or setting.bell  # where it hears of answers
        signed, self.proposal = run.proposal()
        self.leaves = self.proposal.leaves
        self.vouch = Vouch(signed, self.proposal, setting.key, setting.heads)
        self.flower_run, self.task = setting.superlink.open_run()
        self.spool = run.folder / "spool"
        self.spool.mkdir(exist_ok=True)
        self.ticked = 0.0
        self.standing: dict[str, Standing] = {}  # what sites have not answered yet, where rounds do not wait for them
        self.round, self.came = 0, list[Report]()  # the open round, and the answers that count in it

    def state(self) -> Tree:
        """The strategy's state after the last closed round."""
        known = self.run.load(self.plan.digest())
        assert known is not None
        return known[0]

    def _cast(self) -> bytes | Excerpt:
        saved, _ = self.run.checkpoint(self.plan.digest())
        if (excerpt := slicewise.cast(self.strategy, saved)) is not None:
            return excerpt
        del saved
        return b"".join(store.safetensors(tree.flatten(self.strategy.broadcast(self.state()))))

    def _clip(self) -> float | None:
        """What a site's summand is clipped to in the next round, where privacy is of a whole site."""
        if self.plan.site is None:
            return None
        return float(self.state()["clip"]) if self.plan.site.adaptive else self.plan.site.clip

    def propose(self) -> bool:
        """Show the signed proposal to every site, until all have answered, or a deadline after a quorum has agreed.

        People decide at the sites: that may take days. What expires is the proposal. Returns whether the study may
        begin; not if somebody ended it, or the process is ending.

        Raises:
            ConfigError: code ``quorum``, if too many sites refuse, or the proposal expires.
        """
        plan, agreed, refused, since, pause = self.plan, set[str](), dict[str, str](), math.inf, ASK_AGAIN_S
        stop = _Either(self.setting.halt, self.setting.stop)
        while not stop.is_set():
            undecided = tuple(site for site in plan.sites if site not in agreed and site not in refused)
            for answer in self._ask(undecided, self._visit(0), lambda: NOTHING, PROPOSAL_S, (), stop, {}):
                if answer.path is not None:
                    answer.path.unlink(missing_ok=True)
                if answer.code in ("late", "away"):
                    continue
                if answer.code is None:
                    agreed.add(answer.site)
                elif answer.code != "pending":
                    refused[answer.site] = answer.code
                self.events.emit("proposal", run=self.run.name, site=answer.site, code=answer.code)
            left = len(plan.sites) - len(agreed) - len(refused)
            enough = len(agreed) >= plan.quorum
            since = min(since, time.monotonic()) if enough else math.inf
            if enough and (not left or time.monotonic() - since > plan.deadline_s):
                return True
            came = f"{len(agreed)} of {len(plan.sites)} sites have agreed, the quorum is {plan.quorum}"
            if len(agreed) + left < plan.quorum or time.time() > self.proposal.expires:
                codes = ", ".join(f"{site}: {code}" for site, code in sorted(refused.items())) or "the proposal expired"
                raise ConfigError(f"{came} ({codes})", code="quorum")
            self.run.write_status("proposed", 0, came)
            waited = time.monotonic()
            while time.monotonic() - waited < pause and not stop.is_set():
                self.setting.halt.wait(0.2)
            pause = min(pause * 1.2, SELDOM_S)
        return False

    def visit(self, progress: Progress, *, train: bool) -> tuple[Closed, float, Last]:
        """Ask every site once; returns what came, the seconds it took, and what to show of it later."""
        began, plan, round = time.monotonic(), self.plan, progress.round
        made = [self._cast()]  # for the first push; whoever joins later is sent it made anew
        evaluate = not train or round % plan.evaluation.every == 0
        baseline = not train and plan.evaluation.baseline
        cast_sha256 = wire.digest(made[0])
        visit = self._visit(round, train=train, evaluate=evaluate, baseline=baseline, cast_sha256=cast_sha256)
        sent: dict[str, int] = {}
        self.round, self.came = round, []
        stream = self._ask(
            plan.asked(round) if train else plan.sites,
            visit,
            lambda: made.pop() if made else self._cast(),
            plan.deadline_s,
            lasts_from(progress.last),
            _Either(self.setting.halt, self.setting.stop) if train else self.setting.halt,
            sent,
        )
        closed = close_round(
            self.strategy,
            visit,
            self.leaves,
            stream,
            lambda answer: self._note(answer, round),
            self.vouch.check,
            plan.buffer,
            self._clip(),
        )
        return closed._replace(sent=sent), time.monotonic() - began, last_of(visit, closed.reports)

    def _visit(
        self,
        round: int,
        cast_sha256: str = hashlib.sha256(NOTHING).hexdigest(),
        train: bool = False,
        evaluate: bool = False,
        baseline: bool = False,
    ) -> Visit:
        return Visit(
            run=self.run.name,
            round=round,
            train=train,
            evaluate=evaluate,
            baseline=baseline,
            plan=self.plan.canonical(),
            cast_sha256=cast_sha256,
        )

    def _ask(
        self,
        sites: tuple[str, ...],
        visit: Visit,
        cast: Callable[[], bytes | Excerpt],
        deadline_s: float,
        lasts: tuple[Last, ...],
        stop: Flag,
        sent: dict[str, int],
    ) -> Iterator[Answer]:
        """Send a visit to sites and yield their answers, until ``stop``; ``sent`` counts the bytes that each was sent."""
        buffered = visit.train and self.plan.buffer is not None
        setting, shown = self.setting, self.vouch.visits(visit, lasts)

        def push(nodes: list[int], ttl: float) -> dict[int, str]:
            payload = cast()
            names = {node.node_id: name for name, node in setting.superlink.nodes().items() if node.node_id in nodes}
            size = wire.size_of(payload)
            content = wire.packed(payload) if size > wire.INLINE else payload
            contents = {node: wire.record(shown[name], content) for node, name in names.items()}
            ids = setting.superlink.push(self.flower_run, contents, ttl)
            setting.bell.ring()
            for node in ids:
                head = len(shown[names[node]].model_dump_json())
                sent[names[node]] = sent.get(names[node], 0) + size + head
            return ids

        return answers(
            setting.superlink,
            self.flower_run,
            push,
            sites,
            visit,
            deadline_s=deadline_s,
            limit=self.leaves.bytes,
            spool=self.spool,
            tick=self._tick,
            bell=self.ear,
            stop=stop,
            standing=self.standing if buffered else None,
            enough=self._enough if buffered else lambda: False,
        )

    def _enough(self) -> bool:
        """Whether the open round has what its buffer asks for."""
        plan, fresh = self.plan, sum(report.round == self.round for report in self.came)
        return plan.buffer is not None and len(self.came) >= plan.buffer.answers and fresh >= plan.quorum

    def _note(self, answer: Answer, round: int) -> None:
        if answer.code is None and answer.report is not None:
            self.came.append(answer.report)
        seconds = answer.report.seconds if answer.report else None
        self.events.emit(
            "reply",
            run=self.run.name,
            round=round,
            site=answer.site,
            code=answer.code,
            bytes=answer.size,
            seconds=seconds,
        )

    def _tick(self) -> None:
        if time.monotonic() - self.ticked > 5:
            self.ticked = time.monotonic()
            self.setting.superlink.keep_alive(self.task)

    def close(self) -> None:
        """End the Flower run and delete what is left of its messages."""
        self.setting.superlink.close_run(self.flower_run, self.task)


class _Either:
    """Set when either event is."""

    def __init__(self, a: threading.Event, b: threading.Event) -> None:
        self.a, self.b = a, b

    def is_set(self) -> bool:
        return self.a.is_set() or self.b.is_set()
