"""The site daemon: receive, judge, reserve, train, check, send. Each step is durable before the next begins."""

import json
import logging
import os
import signal
import tempfile
import threading
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedtailor import control, pki, plugins, seals, store, wire
from fedtailor.client import airlock, inbox
from fedtailor.client.audit import Audit, heads
from fedtailor.client.chain import Chain
from fedtailor.client.connection import SHUT_OUT
from fedtailor.client.desk import Desk
from fedtailor.client.fleet import Closed, Envelope, Fleet, keep_beating
from fedtailor.client.inbox import Entry
from fedtailor.client.ledger import Ledger
from fedtailor.client.plans import Plans
from fedtailor.client.renewal import keep_renewed
from fedtailor.client.signing import load_signer
from fedtailor.client.site import Home
from fedtailor.client.visits import Held, Visits
from fedtailor.client.workshop import WorkerStopped, Workshop
from fedtailor.errors import ConnectionFailed, FedtailorError, WireError
from fedtailor.wire import Visit

log = logging.getLogger("fedtailor.client")
SELDOM_S = 300.0  # between attempts of a site that was revoked


class Daemon:
    """A running site. ``up`` returns when it is told to stop."""

    def __init__(self, folder: Path) -> None:
        self.home = Home(folder)
        self.config = self.home.config()
        self.home.make()
        plugins.only(self.config.policy.plugins)
        self.stop, self.lost, self.arrived = threading.Event(), threading.Event(), threading.Event()
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
            for folder in (self.home.outbox, self.home.memory):
                inbox.forget_old(folder)
            self.fleet = Fleet(self.config.server, self.config.keys)
            hand = load_signer(self.config.keys)
            self.ledger = Ledger(self.home.state / "ledger.db", hand)
            self.egress = Chain(self.home.state / "egress.jsonl", hand)
            self.audit = Audit(self.home.state / "audit.jsonl", hand)
            self.audit.begin(self.ledger, self.egress, self.home.folder / "site.yaml")
            self.workshop = Workshop(self.config, self.home.state / "worker.log")
            key = pki.load_key(self.config.keys / "site.key")
            signer = seals.load_public(self.config.keys / "plans.pub")
            approved = self.config.policy.plugins
            plans = Plans(self.home.state / "plans", self.config.site, signer, key.public_key(), approved)
            self.visits = Visits(self.config, self.home, plans, key, self.ledger, self.workshop, self.state, self._note)
            socket = control.socket_of(self.home.folder)
            desk = Desk(self.visits, self.arrived.set, lambda: str(self.fleet.certificate.not_valid_after_utc))
            local = control.serve(socket, "Site", self.audit.attend(desk.methods()), {})
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: self.stop.set())
            threads = [
                threading.Thread(target=self._receive, name="receive", daemon=True),
                threading.Thread(target=self._work, name="work", daemon=True),
                threading.Thread(
                    target=keep_beating, args=(self.fleet, self.lost, self.stop), name="beat", daemon=True
                ),
                threading.Thread(
                    target=keep_renewed, args=(self.fleet, self.stop, self._note), name="renew", daemon=True
                ),
                threading.Thread(
                    target=self.visits.withdrawals.keep_telling, args=(self.fleet, self.stop), name="tell", daemon=True
                ),
            ]
            try:
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
                self.audit.note("daemon", "stopped", **heads(self.ledger, self.egress))

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
            except Exception as error:
                if self.stop.is_set():
                    return
                if not isinstance(error, FedtailorError | OSError):  # not of the network or a full disk, but a bug
                    log.exception("receiving failed")
                self.state["connected"] = False
                self._failed(str(error))
                seldom = isinstance(error, ConnectionFailed) and error.code in SHUT_OUT
                self.stop.wait(SELDOM_S if seldom else pause)
                pause = min(pause * 2, 30.0)

    def _join(self) -> None:
        known = self.home.state / "node.json"
        last = int(json.loads(known.read_text())["node_id"]) if known.exists() else None
        self.lost.clear()
        node_id = self.fleet.join(last)
        store.write_json(known, {"node_id": node_id})
        self.state |= {"connected": True, "last_error": None}
        self.audit.note("daemon", "joined", server=self.config.server, node=str(node_id))
        log.info("joined %s", self.config.server)

    def _failed(self, text: str) -> None:
        self.state["last_error"] = text
        log.warning("%s", text)

    def _place(self, envelope: Envelope, root: str) -> None:
        """Write a message to the inbox, then confirm it."""
        with tempfile.NamedTemporaryFile(dir=self.home.state, prefix=".incoming-", delete=False) as sink:
            payload = Path(sink.name)
            try:
                limit = self.config.policy.max_download_mb * 2**20
                head, _ = wire.pour(root, self.fleet.fetch(envelope), sink, limit)
                sink.flush()
                os.fsync(sink.fileno())
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
                except Held as held:
                    self.state["last_error"] = str(held)
                except ConnectionFailed as error:
                    self._failed(str(error))
                    self.stop.wait(1.0)
                    break  # in order: the work of a later round would forget this answer, and could not make it again
                except Exception as error:  # a full disk, say: the message stays in the inbox
                    if self.stop.is_set():
                        return
                    if not isinstance(error, FedtailorError | OSError):
                        log.exception("a message could not be handled; it stays in the inbox")
                    self._failed(f"a message could not be handled; it stays in the inbox: {error}")
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
            self.audit.changed("coordinator", "plan", run=visit.run, sha256=sha256(visit.plan.encode()).hexdigest())
            found = self.visits.answer(entry, visit)
            answer = {"run": visit.run, "round": visit.round, "sha256": found.report.summand_sha256}
            if found.reservation is not None:  # settled before it leaves, also after a crash between the two
                if self.ledger.settle(found.reservation, found.report.summand_sha256):
                    self.audit.note("daemon", "settled", **answer, **heads(self.ledger, self.egress))
            self.state["bytes_sent"] += airlock.release(self.fleet, entry.envelope, found, self.egress)
            self.audit.note("daemon", "released", **answer, **heads(self.ledger, self.egress))
        except Closed:
            log.info("the coordinator no longer waits for this answer; it is kept for when it asks again")
        except (ConnectionFailed, WorkerStopped):
            raise
        except FedtailorError as error:
            self.state["last_error"] = str(error)
            log.warning("refused (%s): %s", error.code, error)
            self._decline(entry.envelope, error.code, visit.run)

    def _note(self, what: str, **facts: Any) -> None:
        """Record what a visit led to. A word that is repeated, as while people have not decided, is recorded once."""
        self.audit.changed("daemon", what, **facts)

    def _decline(self, envelope: Envelope, code: str, run: str | None = None) -> None:
        self._note("dropped" if code.startswith("airlock-") else "declined", code=airlock.word(code), run=run)
        try:
            airlock.decline(self.fleet, envelope, code, self.egress)
        except Closed:
            pass
