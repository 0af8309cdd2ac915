"""One visit of the coordinator, from the plan that it names to an answer in the outbox: judge, reserve, train, admit."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fedtailor import seals, store
from fedtailor.client import airlock, inbox, warrants
from fedtailor.client.inbox import Entry, Stored
from fedtailor.client.ledger import Ledger, Reservation
from fedtailor.client.plans import Known, Plans, State, refuse_unless_approved
from fedtailor.client.site import Home, SiteConfig
from fedtailor.client.withdrawals import Withdrawals
from fedtailor.client.workshop import Workshop
from fedtailor.errors import RefusedError
from fedtailor.policy import Case, Rule, charge_of, metric_charge, open_now, refuse
from fedtailor.policy import verdict as judged
from fedtailor.privacy.accounting import Cap, Charge, epsilon
from fedtailor.proposal import third_party
from fedtailor.receipts import Head
from fedtailor.seals import Private
from fedtailor.study import Plan
from fedtailor.wire import Visit


class Described(NamedTuple):
    """A data set, as the training process describes it."""

    fingerprint: str
    rows: int
    train_rows: int
    test_rows: int
    notes: list[str]


def read(answer: dict[str, Any]) -> Described:
    """Read a description.

    Raises:
        RefusedError: code ``worker``, if it is none.
    """
    try:
        found = Described(**answer)
        counts = (found.rows, found.train_rows, found.test_rows)
        sound = all(isinstance(n, int) and n >= 0 for n in counts) and found.train_rows + found.test_rows <= found.rows
    except TypeError:
        sound = False
    if not sound:
        raise RefusedError("the training process describes the data in a way that cannot be", code="worker")
    return found


class Held(Exception):
    """An answer that a person has to release."""


class Visits:
    """What a site does when it is asked. ``state`` is told what is going on, for people who look."""

    def __init__(
        self,
        config: SiteConfig,
        home: Home,
        plans: Plans,
        key: Private,
        ledger: Ledger,
        workshop: Workshop,
        state: dict[str, Any],
        note: Callable[..., None] = lambda what, **facts: None,
    ) -> None:
        self.config, self.home, self.plans, self.key = config, home, plans, key
        self.ledger, self.workshop, self.state = ledger, workshop, state
        self.note = note  # for the audit log
        self.withdrawals = Withdrawals(home.state / "withdrawals", config.site, config.keys)

    def answer(self, entry: Entry, visit: Visit) -> Stored:
        """The answer to a visit: from the outbox where it was answered before, else worked out and put there.

        Raises:
            RefusedError: if the policy, the people, the budget or the airlock says no; nothing new is in the outbox then.
            Held: if a person has to release the answer first.
        """
        known, policy = self.plans.take(visit), self.config.policy
        state = self.stands(known)
        if state != "pending":
            refuse_unless_approved(state, known)
        found = inbox.stored(self.home.outbox, visit)
        if found is None:
            self.perform(entry, visit, known)
            found = inbox.stored(self.home.outbox, visit)
            assert found is not None
        if visit.train:
            known.note_answer(visit.round, found.report.summand_sha256)
        last = visit.train and visit.round == known.proposal.plan.rounds - 1
        if (visit.train and policy.hold == "each" or last and policy.hold == "last") and not inbox.may_leave(
            self.home.outbox, visit
        ):
            inbox.hold(self.home.outbox, visit)
            self.note("held", run=visit.run, round=visit.round)
            raise Held(f"an answer waits for release: {visit.run}, round {visit.round}; see: fedtailor client held")
        return found

    def stands(self, known: Known) -> State:
        """Where a study stands at this site now."""
        withdrawn = self.withdrawals.covers(known.proposal.plan.study)
        return "withdrawn" if withdrawn else self.plans.stands(known, self.config.policy)

    def perform(self, entry: Entry, visit: Visit, known: Known) -> None:
        """Do the visit's work and leave its answer in the outbox. Done again after a crash, it is the same answer."""
        policy, plan = self.config.policy, known.proposal.plan
        refuse(self.verdict(known, []))  # before the data are touched at all
        refuse_unless_approved(self.stands(known), known)
        warrants.check(visit, known, policy, self.plans.signer, self.plans.own, self.ledger)
        if visit.train and self.config.site not in plan.asked(visit.round):
            raise RefusedError(f"round {visit.round} is not this site's turn", code="rounds")
        asks = visit.train or visit.evaluate or visit.baseline
        if asks:
            open_now(policy, datetime.now())
        if store.digest(entry.payload) != visit.cast_sha256:  # by that name the answer is stored, and charged for
            raise RefusedError("what was cast is not what the visit names (cast_sha256)", code="cast")
        self.state |= {"study": plan.study, "round": visit.round, "rounds": plan.rounds, "run": visit.run}
        data = self.described(plan)
        self.state["data"] = data._asdict()
        self.note("data", name=self.config.data.name, fingerprint=data.fingerprint)
        rules = self.verdict(known, self.spent_before(visit.run, data.fingerprint))
        self.note("judged", run=visit.run, proposal=known.digest, against=[rule.code for rule in rules if not rule.ok])
        refuse(rules)
        inbox.tidy(self.home.outbox, visit)
        if not asks:
            airlock.agree(self.home.outbox, visit, airlock.Facts(head=self.head()))
            return
        known.note_cast(visit.round, visit.cast_sha256)
        reservation = self._reserve(plan, visit, data.fingerprint)
        if reservation is not None:
            self.note("reserved", run=visit.run, round=visit.round, reservation=reservation.id)
        metric = self._reserve_metrics(known, visit, data.fingerprint)
        out = self._work(entry, visit, reservation)
        facts = airlock.Facts(
            epsilon=self._spent(plan, visit),
            rows=data.rows,
            train_rows=data.train_rows,
            test_rows=data.test_rows,
            reservation=reservation.id if reservation else None,
            witness=seals.sign(self.key, "witness", visit.witnessed()),
            head=self.head(),
            metric_key=metric.key if metric else None,
        )
        try:
            airlock.admit(out, self.home.outbox, visit, known.proposal.leaves, policy, facts)
        except RefusedError as error:  # whatever trains here tried to say something else: not once more
            self.plans.decide(known, "stopped", "airlock", error.code)
            raise
        finally:
            shutil.rmtree(out, ignore_errors=True)
        if metric is not None:
            self.ledger.settle(metric.id, inbox.key_of(visit))

    def described(self, plan: Plan) -> Described:
        """The data, by the training process's word as far as this daemon can check it: the counts will leave."""
        found = read(self.workshop.ask(op="describe", recipe=plan.recipe.model_dump(by_alias=True)))
        try:
            size = self.config.data.path.stat().st_size
        except OSError:
            return found  # the training process said what is wrong, if it matters
        if found.rows > size // 2:  # a row has a cell and an end at least
            raise RefusedError(f"the training process counts {found.rows} rows in {size} bytes", code="worker")
        return found

    def _work(self, entry: Entry, visit: Visit, reservation: Reservation | None) -> Path:
        """Have the training process do the visit; its outcome lies in the folder that is returned."""
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
        return out

    def head(self) -> Head | None:
        """The ledger's last entry, by this site's hand: the coordinator will show it again."""
        count, hash = self.ledger.head()
        if not count:
            return None
        return Head(count=count, hash=hash, signature=seals.sign(self.key, "ledger-head", f"{count}:{hash}"))

    def verdict(self, known: Known, spent: list[Charge]) -> list[Rule]:
        proposal = known.proposal
        leaves, codes = proposal.leaves, third_party(proposal)
        case = Case(self.config.site, spent, leaves.bytes, leaves.models, codes)
        return judged(self.config.policy, proposal.plan, case)

    def spent_before(self, run: str, fingerprint: str) -> list[Charge]:
        """What other runs have charged to the data."""
        return self.ledger.charges(self.config.data.name, fingerprint, without=run)

    def _reserve(self, plan: Plan, visit: Visit, fingerprint: str) -> Reservation | None:
        charge = charge_of(plan)
        if charge is None or plan.record is None or not visit.train:
            return None
        cap = Cap(self.config.policy.epsilon, plan.record.delta)
        reserve = partial(
            self.ledger.reserve,
            account=self.config.data.name,
            fingerprint=fingerprint,
            study=visit.run,
            visit=inbox.key_of(visit),
            charge=charge,
            cap=cap,
            promise=plan.record.epsilon,
        )
        reservation = reserve()
        if reservation.key is None:  # it was settled, but its answer is gone from the outbox: this is a new release
            reservation = reserve(again=True)
        return reservation

    def _reserve_metrics(self, known: Known, visit: Visit, fingerprint: str) -> Reservation | None:
        """Charge for the noised metrics of a visit; the work is not done where the budget does not suffice for them."""
        plan, leaves = known.proposal.plan, known.proposal.leaves
        charge, count = metric_charge(self.config.policy), leaves.models * visit.evaluate + visit.baseline
        if charge is None or not count:
            return None
        delta = plan.record.delta if plan.record else self.config.policy.delta
        reserve = partial(
            self.ledger.reserve,
            account=self.config.data.name,
            fingerprint=fingerprint,
            study=f"{visit.run}/metrics",  # the plan's promise is of training alone
            visit=inbox.key_of(visit),
            charge=replace(charge, steps=count),
            cap=Cap(self.config.policy.epsilon, delta),
        )
        reservation = reserve()
        return reservation if reservation.key is not None else reserve(again=True)

    def _memory(self, visit: Visit) -> Path | None:
        """What a stateful strategy kept here after the last round before this one."""
        files = sorted((self.home.memory / visit.run).glob("*.safetensors"))
        earlier = [path for path in files if int(path.stem) < visit.round]
        return earlier[-1] if earlier else None

    def _spent(self, plan: Plan, visit: Visit) -> float | None:
        """The run's epsilon on this data set, over every round that was reserved for it."""
        if plan.record is None:
            return None
        charges = [entry.charge for entry in self.ledger.statement() if entry.study == visit.run]
        return epsilon(charges, plan.record.delta)
