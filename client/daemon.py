"""The site daemon: receive, judge, reserve, train, check, send. Each step is durable before the next begins."""

import json
import logging
import shutil
import signal
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedtailor import control, store, wire
from fedtailor.client import airlock, inbox
from fedtailor.client.fleet import Closed, Envelope, Fleet, keep_beating
from fedtailor.client.inbox import Entry
from fedtailor.client.ledger import Ledger, Reservation
from fedtailor.client.site import Home, charge_of, judge
from fedtailor.client.workshop import WorkerDied, Workshop
from fedtailor.config import readable
from fedtailor.errors import ConnectionFailed, FedtailorError, RefusedError, WireError
from fedtailor.privacy.accounting import Cap, epsilon
from fedtailor.study import Plan
from fedtailor.wire import Visit

log = logging.getLogger("fedtailor.client")
TRIES = 3  # how often work is begun again when the training process dies


class Daemon:
    """A running site. ``up`` returns when it is told to stop."""

    def __init__(self, folder: Path) -> None:
        self.home = Home(folder)
        self.config = self.home.config()
        self.home.make()
        self.stop, self.lost, self.arrived = threading.Event(), threading.Event(), threading.Event()
        self.egress = self.home.state / "egress.jsonl"
        self.state: dict[str, Any] = {
            "connected": False,
            "study": None,
            "round": None,
            "bytes_sent": 0,
            "last_error": None,
        }

    def up(self) -> None:
        """Serve until SIGTERM or SIGINT; what is under way is taken up again at the next start."""
        with control.only_one(self.home.folder):
            for folder in (self.home.inbox, self.home.outbox):
                inbox.clear_drafts(folder)
            self.fleet = Fleet(self.config.server, self.config.keys)
            self.ledger = Ledger(self.home.state / "ledger.db")
            self.workshop = Workshop(self.config, self.home.state / "worker.log")
            socket = control.socket_of(self.home.folder)
            methods: dict[str, control.Method] = {
                "Status": self._status,
                "Ledger": self._ledger,
                "Egress": self._egress,
            }
            local = control.serve(socket, "Site", methods, {})
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: self.stop.set())
            threads = [
                threading.Thread(target=self._receive, name="receive", daemon=True),
                threading.Thread(target=self._work, name="work", daemon=True),
                threading.Thread(
                    target=keep_beating, args=(self.fleet, self.lost, self.stop), name="beat", daemon=True
                ),
            ]
            try:
                with self.workshop.lock:
                    self.workshop.start()
                import fedtailor.recipes  # here, not in the first round: the airlock builds recipes as well
                import fedtailor.strategies  # noqa: F401

                for thread in threads:
                    thread.start()
                self.stop.wait()
            finally:
                self.stop.set()
                self.fleet.leave()
                self.workshop.stop()
                local.stop(grace=1)
                socket.unlink(missing_ok=True)

    # --- receiving ---

    def _receive(self) -> None:
        pause = 1.0
        while not self.stop.is_set():
            try:
                self._join()
                pause = 1.0
                while not self.stop.is_set() and not self.lost.is_set():
                    began = time.monotonic()
                    if (got := self.fleet.receive()) is not None:
                        self._place(*got)
                    elif time.monotonic() - began < 0.5:
                        self.stop.wait(0.2)  # the coordinator did not hold the question: do not ask in a tight loop
            except ConnectionFailed as error:
                if self.stop.is_set():
                    return
                self._failed(str(error))
                self.stop.wait(pause)
                pause = min(pause * 2, 30.0)
            except Exception:
                log.exception("receiving failed")
                self.stop.wait(pause)

    def _join(self) -> None:
        known = self.home.state / "node.json"
        last = int(json.loads(known.read_text())["node_id"]) if known.exists() else None
        self.lost.clear()
        node_id = self.fleet.join(last)
        store.write_json(known, {"node_id": node_id})
        self.state |= {"connected": True, "last_error": None}
        log.info("joined %s", self.config.server)

    def _failed(self, text: str) -> None:
        self.state |= {"connected": False, "last_error": text}
        log.warning("%s", text)

    def _place(self, envelope: Envelope, root: str) -> None:
        """Write a message to the inbox, then confirm it."""
        with tempfile.NamedTemporaryFile(dir=self.home.state, prefix=".incoming-", delete=False) as sink:
            payload = Path(sink.name)
            try:
                limit = self.config.policy.max_download_mb * 2**20
                head, _ = wire.pour(root, self.fleet.fetch(envelope), sink, limit)
                sink.flush()
            except WireError as error:
                payload.unlink(missing_ok=True)
                log.warning("a message was dropped: %s", error)
                self._decline(envelope, error.code)
                return
            except BaseException:
                payload.unlink(missing_ok=True)
                raise
        inbox.place(self.home.inbox, envelope, head, payload)
        self.arrived.set()
        self.fleet.confirm(envelope)

    # --- working ---

    def _work(self) -> None:
        while not self.stop.is_set():
            self.arrived.clear()
            for entry in list(inbox.waiting(self.home.inbox)):
                if self.stop.is_set():
                    return
                try:
                    self._answer(entry)
                    inbox.drop(entry)
                except ConnectionFailed as error:
                    self._failed(str(error))
                    self.stop.wait(1.0)
                except Exception as error:  # a full disk, say: the message stays in the inbox
                    if self.stop.is_set():
                        return
                    log.exception("a message could not be handled; it stays in the inbox")
                    self.state["last_error"] = f"{type(error).__name__}: {error}"
                    self.stop.wait(5.0)
            self.arrived.wait(1.0)

    def _answer(self, entry: Entry) -> None:
        """Answer one message, from the outbox where the visit was answered before."""
        if time.time() > entry.envelope.expires:
            return
        while self.fleet.node is None and not self.stop.wait(0.1):
            pass
        try:
            visit = wire.parse_head(Visit, entry.head())
            found = inbox.stored(self.home.outbox, visit)
            if found is None:
                self._perform(entry, visit)
                found = inbox.stored(self.home.outbox, visit)
                assert found is not None
            if found.reservation is not None:  # settled before it leaves, also after a crash between the two
                self.ledger.settle(found.reservation, found.report.summand_sha256)
            self.state["bytes_sent"] += airlock.release(
                self.fleet, entry.envelope, found.report, found.payload, self.egress
            )
        except Closed:
            log.info("the coordinator no longer waits for this answer; it is kept for when it asks again")
        except (ConnectionFailed, WorkerStopped):
            raise
        except FedtailorError as error:
            self.state["last_error"] = str(error)
            log.warning("refused (%s): %s", error.code, error)
            self._decline(entry.envelope, error.code)

    def _decline(self, envelope: Envelope, code: str) -> None:
        try:
            airlock.decline(self.fleet, envelope, code, self.egress)
        except Closed:
            pass

    def _perform(self, entry: Entry, visit: Visit) -> None:
        """Judge, reserve, train, and pass the airlock into the outbox."""
        try:
            plan = Plan.parse(visit.plan)
        except ValidationError as error:
            raise RefusedError(f"the plan is malformed: {readable(error)}", code="plan") from error
        judge(self.config, plan)
        self.state |= {"study": plan.study, "round": visit.round, "rounds": plan.rounds, "run": visit.run}
        data = self.workshop.ask(op="describe", recipe=plan.recipe.model_dump(by_alias=True))
        self.state["data"] = data
        reservation = self._reserve(plan, visit, data["fingerprint"])
        inbox.tidy(self.home.outbox, visit)
        out = self.home.state / f".work-{inbox.key_of(visit)}"
        request = {
            "entry": str(entry.folder),
            "out": str(out),
            "key": reservation.key.hex() if reservation and reservation.key else None,
            "memory": str(memory) if (memory := self._memory(visit)) else None,
        }
        for attempt in range(TRIES):
            shutil.rmtree(out, ignore_errors=True)
            try:
                self.workshop.ask(op="visit", **request)
                break
            except WorkerDied as error:
                if self.stop.is_set():
                    raise WorkerStopped from error
                log.warning("%s; try %d of %d", error, attempt + 1, TRIES)
                if attempt == TRIES - 1:
                    raise
        if (out / "memory.safetensors").exists():
            kept = self.home.memory / visit.run
            kept.mkdir(mode=0o700, exist_ok=True)
            (out / "memory.safetensors").replace(kept / f"{visit.round:06d}.safetensors")
        spent = self._spent(plan, visit)
        airlock.admit(
            out,
            self.home.outbox,
            visit,
            self.config.policy,
            epsilon=spent,
            test_rows=data["test_rows"],
            reservation=reservation.id if reservation else None,
        )
        shutil.rmtree(out, ignore_errors=True)

    def _reserve(self, plan: Plan, visit: Visit, fingerprint: str) -> Reservation | None:
        charge = charge_of(plan)
        if charge is None or plan.privacy is None or not visit.train:
            return None
        cap = Cap(self.config.policy.epsilon, plan.privacy.delta)
        reserve = partial(
            self.ledger.reserve,
            account=self.config.data.name,
            fingerprint=fingerprint,
            study=visit.run,
            visit=inbox.key_of(visit),
            charge=charge,
            cap=cap,
        )
        reservation = reserve()
        if reservation.key is None:  # it was settled, but its answer is gone from the outbox: this is a new release
            reservation = reserve(again=True)
        return reservation

    def _memory(self, visit: Visit) -> Path | None:
        """What a stateful strategy kept here after the last round before this one."""
        files = sorted((self.home.memory / visit.run).glob("*.safetensors"))
        earlier = [path for path in files if int(path.stem) < visit.round]
        return earlier[-1] if earlier else None

    def _spent(self, plan: Plan, visit: Visit) -> float | None:
        """The run's epsilon on this data set, over every round that was reserved for it."""
        if plan.privacy is None:
            return None
        charges = [entry.charge for entry in self.ledger.statement() if entry.study == visit.run]
        return epsilon(charges, plan.privacy.delta)

    # --- what the site's people may ask ---

    def _status(self, _: dict[str, Any]) -> dict[str, Any]:
        policy, data = self.config.policy, self.state.get("data")
        spent = self.ledger.spent(
            account=self.config.data.name, fingerprint=data["fingerprint"] if data else "", delta=policy.delta
        )
        left = max(policy.epsilon - spent, 0.0)
        budget = {"spent": spent, "left": left, "cap": policy.epsilon, "delta": policy.delta, "unit": "record"}
        return self.state | {"site": self.config.site, "server": self.config.server, "epsilon": budget,
                             "worker_pid": self.workshop.pid}  # fmt: skip

    def _ledger(self, _: dict[str, Any]) -> dict[str, Any]:
        rows = []
        for entry in self.ledger.statement():
            charge, state = entry.charge, "settled" if entry.settled_digest else "reserved"
            rows.append({"time": entry.time, "data": entry.account, "run": entry.study, "state": state,
                         "noise": charge.noise_multiplier, "rate": charge.rate, "steps": charge.steps})  # fmt: skip
        return {"rows": rows}

    def _egress(self, _: dict[str, Any]) -> dict[str, Any]:
        lines = self.egress.read_text().splitlines() if self.egress.exists() else []
        return {"rows": [json.loads(line) for line in lines]}


class WorkerStopped(Exception):
    """The training process was ended because the daemon is stopping."""
