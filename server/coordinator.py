"""The coordinator: one process that listens to sites, runs studies one after another, and obeys its operator."""

import functools
import gc
import json
import logging
import queue
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedtailor import control, heap, pki, proposal, store
from fedtailor.config import build, readable
from fedtailor.errors import ConfigError, ConnectionFailed
from fedtailor.leaving import Leaving
from fedtailor.privacy.planning import strategy_of
from fedtailor.recipe import Recipe
from fedtailor.seals import Public
from fedtailor.server import renewal, roster, withdrawals
from fedtailor.server.enrolment import Gate, gated
from fedtailor.server.home import Home
from fedtailor.server.listener import Bell, described, public, serve, wait_until_started
from fedtailor.server.memory import drop_code, keep_heaps_few
from fedtailor.server.noise import forget
from fedtailor.server.runs import DONE, Run
from fedtailor.server.studies import execute, propose
from fedtailor.server.superlink import SuperLink
from fedtailor.server.tour import Setting
from fedtailor.server.vouching import Heads
from fedtailor.study import Plan

log = logging.getLogger("fedtailor.server")


class Coordinator:
    """A running coordinator. ``up`` returns when it is told to stop."""

    def __init__(self, folder: Path) -> None:
        self.home = Home(folder)
        self.config = self.home.config()
        self.halt = threading.Event()
        self.queue: queue.Queue[str] = queue.Queue()
        self.under_way: dict[str, threading.Event] = {}  # runs that are proposed or executing, and their stops

    def up(self) -> None:
        """Serve until SIGTERM or SIGINT; studies that are under way resume at the next start.

        Raises:
            ConnectionFailed: if the port or the home is taken.
        """
        keep_heaps_few()
        with control.only_one(self.home.folder):
            self._check_port()
            self.bell = Bell()
            self.superlink = SuperLink(self.home.folder / "flower.db", self.home.folder / "transit")
            self.superlink.close_stale_runs()
            gate = Gate(self.home, self.superlink.admit)
            gate.look()
            renewal.renew(self.home)
            waiting = self._waiting()
            app = gated(public(self.superlink.app, self.bell), gate)
            beside = functools.partial(renewal.keep_renewed, self.home)
            self.server = serve(app, self.config.host, self.config.port, self.home.tls, beside)
            self.bell.ending = lambda: self.server.should_exit
            self.transport = described(self.server, bool(self.superlink.app.state.enable_supernode_auth))
            for run in waiting:
                self._begin(run)
            scheduler = threading.Thread(target=self._schedule, name="scheduler")
            scheduler.start()
            socket_path = control.socket_of(self.home.folder)
            methods = {"Submit": self._submit, "Runs": self._list, "Stop": self._stop, "Status": self._status,
                       "Resume": self._resume, "Retrain": self._retrain, "Models": self._models}  # fmt: skip
            local = control.serve(socket_path, "Server", methods, {"Watch": self._watch})
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: None)  # uvicorn takes them over, and hands them back when it ends
            import fedtailor.recipes  # here, not when the first study is submitted
            import fedtailor.strategies  # noqa: F401

            drop_code()
            gc.collect()
            heap.trim()
            gc.freeze()  # what is loaded by now stays: later sweeps need not look at it
            try:
                self.server.run()
            finally:
                self.halt.set()
                self.queue.put("")
                self.bell.hear(False)
                local.stop(grace=1)
                scheduler.join(timeout=30)
                socket_path.unlink(missing_ok=True)

    def _check_port(self) -> None:
        family = socket.AF_INET6 if ":" in self.config.host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.config.host, self.config.port))
            except OSError as error:
                where = f"{self.config.host}:{self.config.port}"
                way = f"free it, or change host or port in {self.home.folder / 'server.yaml'}"
                raise ConnectionFailed(f"cannot listen on {where}: {error.strerror}; {way}") from error

    def _runs(self) -> list[Run]:
        return [Run(folder) for folder in self.home.studies.iterdir() if (folder / "plan.json").exists()]

    def _waiting(self) -> list[Run]:
        """The runs that are not over, the oldest first. A completed one may not have forgotten its noise yet: it does."""
        waiting = []
        for run in sorted(self._runs(), key=lambda run: run.name):
            if (status := run.status().status) not in DONE:
                waiting.append(run)
            elif status == "completed":
                forget(run)
        return waiting

    def _run(self, name: str) -> Run:
        run = Run(self.home.studies / name)
        if not name or "/" in name or not (run.folder / "plan.json").exists():
            known = ", ".join(sorted(r.name for r in self._runs())) or "none yet"
            raise ConfigError(f"run {name!r}: there is no such run; there are: {known}")
        return run

    # --- what the operator may ask ---

    def _submit(self, request: dict[str, Any]) -> dict[str, Any]:
        """Queue a plan; it is refused here if it names a site, recipe or strategy that does not exist."""
        plan = Plan.parse(request["plan"])
        admitted = roster.admitted(self.home)
        unknown = [site for site in plan.sites if site not in admitted]
        if unknown:
            raise ConfigError(f"sites: {unknown} are not admitted; see: fedtailor server sites, invite, approve")
        if gone := sorted(withdrawals.withdrawn(self.home, plan.study) & set(plan.sites)):
            raise ConfigError(f"sites: {gone} have withdrawn from {plan.study!r}; leave them out of sites=[…]")
        build(plan.recipe, Recipe)
        strategy_of(plan)
        days = float(request.get("days", 30.0))
        try:
            leaves = Leaving.model_validate_json(request["leaves"]) if "leaves" in request else None
        except ValidationError as error:
            raise ConfigError(f"leaves: {readable(error)}") from error

        def signed(run: str) -> str:
            made = proposal.propose(plan, run, self._keys(plan), days=days, leaves=leaves)
            return proposal.signed(made, self.home.signer())

        run = Run.create(self.home.studies, plan, request.get("config", ""), signed)
        self._begin(run)
        return {"run": run.name, "folder": str(run.folder)}

    def _retrain(self, request: dict[str, Any]) -> dict[str, Any]:
        """Propose a run's plan again without some of its sites."""
        run = self._run(request["run"])
        plan, without = run.plan(), set(request["without"])
        if unknown := sorted(without - set(plan.sites)):
            raise ConfigError(f"--without: {unknown} are not in run {run.name!r}; it has {', '.join(plan.sites)}")
        sites = [site for site in plan.sites if site not in without]
        again = plan.model_dump(mode="json", by_alias=True) | {"sites": sites, "quorum": min(plan.quorum, len(sites))}
        try:
            anew = Plan.model_validate(again)
        except ValidationError as error:
            raise ConfigError(f"--without: {readable(error)}") from error
        made = self._submit({"plan": anew.canonical(), "config": request.get("config", "")})
        store.write_json(
            self.home.studies / made["run"] / "retrains.json", {"run": run.name, "without": sorted(without)}
        )
        return made

    def _models(self, _: dict[str, Any]) -> dict[str, Any]:
        """Every model there is, and whose answers are in it."""
        rows = []
        for run in sorted(self._runs(), key=lambda one: one.name):
            if not (run.folder / "model.safetensors").exists():
                continue
            study, inside = run.plan().study, run.contributors()
            gone = withdrawals.withdrawn(self.home, study) & set(inside)
            rows.append({"run": run.name, "study": study, "sites": inside, "withdrawn": sorted(gone),
                         "model": str(run.folder / "model.safetensors")})  # fmt: skip
        return {"rows": rows}

    def _keys(self, plan: Plan) -> dict[str, Public]:
        admitted = roster.admitted(self.home)
        return {site: pki.read_key_text(admitted[site]) for site in plan.sites}

    def _list(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"runs": [status._asdict() for status in sorted(run.status() for run in self._runs())]}

    def _status(self, _: dict[str, Any]) -> dict[str, Any]:
        known = self.superlink.nodes()
        nodes = {name: name in known and known[name].online for name in roster.admitted(self.home)}
        address = f"{self.config.host}:{self.config.port}"
        return {"address": address, "sites": nodes, "transport": self.transport, "ready": self.server.started}

    def _stop(self, request: dict[str, Any]) -> dict[str, Any]:
        run = self._run(request["run"])
        status = run.status()
        if status.status in DONE:
            raise ConfigError(f"run {run.name!r} has ended already: {status.status}")
        if (stop := self.under_way.get(run.name)) is not None:  # whoever is at it writes how it ended
            stop.set()
            self.bell.hear(False)
        else:
            run.write_status("stopped", status.round, "stopped before it began")
        return {"run": run.name}

    def _resume(self, request: dict[str, Any]) -> dict[str, Any]:
        run = self._run(request["run"])
        status = run.status()
        if status.status in ("completed", "proposed", "queued", "running"):
            raise ConfigError(f"run {run.name!r} is {status.status}; only a failed or stopped run can be resumed")
        run.write_status("queued" if run.agreed() else "proposed", status.round)
        self._begin(run)
        return {"run": run.name}

    def _watch(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Every event of a run from its beginning, until it ends."""
        run = self._run(request["run"])
        path, position = run.folder / "events.jsonl", 0
        while not self.halt.is_set():
            ended = run.ended()  # read before the file: nothing is written after it
            if path.exists():
                with path.open("rb") as file:
                    file.seek(position)
                    for line in file:
                        if line.endswith(b"\n"):
                            position += len(line)
                            yield json.loads(line)
            if ended:
                return
            time.sleep(0.2)

    # --- studies: many are proposed at a time, and run one after another ---

    def _setting(self, stop: threading.Event) -> Setting:
        return Setting(
            superlink=self.superlink,
            bell=self.bell,
            key=self.home.signer(),
            heads=Heads(self.home.folder / "heads"),
            transport=self.transport,
            stop=stop,
            halt=self.halt,
            watch=lambda event: log.info("%s", event),
        )

    def _begin(self, run: Run) -> None:
        """Queue a run that its sites have agreed to; propose any other, in a thread of its own."""

        stop = threading.Event()

        def proposing() -> None:
            wait_until_started(self.server)
            agreed = propose(run, self._setting(stop))
            self.under_way.pop(run.name, None)
            if agreed:
                self.queue.put(run.name)

        if run.agreed():
            self.queue.put(run.name)
        else:
            self.under_way[run.name] = stop
            threading.Thread(target=proposing, name=f"propose-{run.name}", daemon=True).start()

    def _schedule(self) -> None:
        wait_until_started(self.server)
        while not self.halt.is_set():
            name = self.queue.get()
            if not name or self.halt.is_set():
                return
            run = Run(self.home.studies / name)
            if run.status().status in DONE:
                continue
            stop = threading.Event()
            self.under_way[name] = stop
            execute(run, self._setting(stop))
            self.under_way.pop(name, None)
