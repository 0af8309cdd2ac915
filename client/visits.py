"""One visit of the coordinator, from the plan that it names to an answer in the outbox: judge, reserve, train, admit."""

import shutil
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedtailor import store, wire
from fedtailor.client import airlock, inbox
from fedtailor.client.inbox import Entry
from fedtailor.client.ledger import Ledger, Reservation
from fedtailor.client.site import Home, SiteConfig
from fedtailor.client.workshop import Workshop
from fedtailor.config import readable
from fedtailor.errors import RefusedError
from fedtailor.policy import Case, Rule, charge_of, open_now, refuse, verdict
from fedtailor.privacy.accounting import Cap, Charge, epsilon
from fedtailor.study import Plan
from fedtailor.wire import Visit


class Visits:
    """What a site does when it is asked. ``state`` is told what is going on, for people who look."""

    def __init__(
        self, config: SiteConfig, home: Home, ledger: Ledger, workshop: Workshop, state: dict[str, Any]
    ) -> None:
        self.config, self.home, self.ledger, self.workshop, self.state = config, home, ledger, workshop, state

    def perform(self, entry: Entry, visit: Visit) -> None:
        """Do the visit's work and leave its answer in the outbox. Done again after a crash, it is the same answer.

        Raises:
            RefusedError: if the policy, the budget or the airlock says no; nothing is in the outbox then.
        """
        try:
            plan = Plan.parse(visit.plan)
        except (ValidationError, ValueError) as error:
            text = readable(error) if isinstance(error, ValidationError) else str(error)
            raise RefusedError(f"the plan is malformed: {text}", code="plan") from error
        refuse(self._verdict(plan, []))  # before the data are touched at all
        open_now(self.config.policy, datetime.now())
        if visit.train and visit.round >= plan.rounds:
            raise RefusedError(f"round {visit.round}: the plan has {plan.rounds} rounds", code="rounds")
        if store.digest(entry.payload) != visit.cast_sha256:  # by that name the answer is stored, and charged for
            raise RefusedError("what was cast is not what the visit names (cast_sha256)", code="cast")
        self.state |= {"study": plan.study, "round": visit.round, "rounds": plan.rounds, "run": visit.run}
        data = self.workshop.ask(op="describe", recipe=plan.recipe.model_dump(by_alias=True))
        self.state["data"] = data
        refuse(self._verdict(plan, self._spent_before(visit.run, data["fingerprint"])))
        reservation = self._reserve(plan, visit, data["fingerprint"])
        inbox.tidy(self.home.outbox, visit)
        out = self.home.state / "work" / inbox.key_of(visit)
        memory = self._memory(visit)
        self.workshop.ask(
            op="visit",
            entry=str(entry.folder),
            out=str(out),
            key=reservation.key.hex() if reservation and reservation.key else None,
            memory=str(memory) if memory else None,
        )
        if (out / "memory.safetensors").exists():
            kept = self.home.memory / visit.run
            kept.mkdir(mode=0o700, exist_ok=True)
            (out / "memory.safetensors").replace(kept / f"{visit.round:06d}.safetensors")
        airlock.admit(
            out,
            self.home.outbox,
            visit,
            self.config.policy,
            epsilon=self._spent(plan, visit),
            test_rows=data["test_rows"],
            reservation=reservation.id if reservation else None,
        )
        shutil.rmtree(out, ignore_errors=True)

    def _verdict(self, plan: Plan, spent: list[Charge]) -> list[Rule]:
        size = wire.size_limit(airlock.agreed(plan.canonical()))
        return verdict(self.config.policy, plan, Case(self.config.site, spent, size))

    def _spent_before(self, run: str, fingerprint: str) -> list[Charge]:
        """What other runs have charged to the data."""
        return self.ledger.charges(self.config.data.name, fingerprint, without=run)

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
            promise=plan.privacy.epsilon,
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
