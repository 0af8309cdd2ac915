"""What a site's people may ask of their daemon, and decide: the methods behind ``fedtailor client …``."""

import json
from collections.abc import Callable
from typing import Any, Literal

from fedtailor import control, inspection
from fedtailor.client import inbox
from fedtailor.client.chain import rows
from fedtailor.client.plans import Approval, Known, as_row
from fedtailor.client.rehearsal import rehearse
from fedtailor.client.statement import statement
from fedtailor.client.visits import Visits
from fedtailor.errors import RefusedError
from fedtailor.policy import refuse

Asked = dict[str, Any]


class Desk:
    """The answers; ``wake`` has the daemon look at its inbox."""

    def __init__(self, visits: Visits, wake: Callable[[], None], certificate_until: Callable[[], str]) -> None:
        self.visits, self.wake, self.certificate_until = visits, wake, certificate_until
        self.config, self.home, self.plans, self.ledger = visits.config, visits.home, visits.plans, visits.ledger
        self.workshop, self.state = visits.workshop, visits.state

    def methods(self) -> dict[str, control.Method]:
        """By the names under which the control socket offers them."""
        return {"Status": self.status, "Ledger": self.statement, "Egress": self.egress, "Plans": self.list,
                "Plan": self.show, "Approve": self.approve, "Refuse": self.refuse, "Held": self.held,
                "Release": self.release, "Receipts": self.receipts, "Check": self.check,
                "Withdraw": self.withdraw, "Back": self.back}  # fmt: skip

    def status(self, _: Asked) -> Asked:
        """Study, round, budget, bytes."""
        policy, data = self.config.policy, self.state.get("data")
        spent = self.ledger.spent(
            account=self.config.data.name, fingerprint=data["fingerprint"] if data else "", delta=policy.delta
        )
        left = max(policy.epsilon - spent, 0.0)
        budget = {"spent": spent, "left": left, "cap": policy.epsilon, "delta": policy.delta, "unit": "record"}
        waiting = sum(self.visits.stands(known) == "pending" for known in self.plans.all())
        return self.state | {"site": self.config.site, "server": self.config.server, "epsilon": budget,
                             "waiting": waiting, "worker_pid": self.workshop.pid,
                             "confinement": self.workshop.found(),
                             "certificate_until": self.certificate_until()}  # fmt: skip

    def statement(self, _: Asked) -> Asked:
        """What each data set has spent, on which runs, and what is left; and every charge."""
        fingerprint = (self.state.get("data") or {}).get("fingerprint", "")
        return statement(self.ledger, self.config.data.name, fingerprint, self.config.policy)

    def egress(self, _: Asked) -> Asked:
        """Everything that has left."""
        return {"rows": rows(self.home.state / "egress.jsonl")}

    def list(self, _: Asked) -> Asked:
        """Every study that was proposed."""
        return {"rows": [as_row(known, self.visits.stands(known)) for known in self.plans.all()]}

    def show(self, request: Asked) -> Asked:
        """One study in plain words: what it asks, what it costs, and each rule of the policy."""
        return self._shown(self.plans.find(str(request["plan"])))

    def _shown(self, known: Known) -> Asked:
        policy, proposal = self.config.policy, known.proposal
        fingerprint = (self.state.get("data") or {}).get("fingerprint", "")
        rules = self.visits.verdict(known, self.visits.spent_before(proposal.run, fingerprint))
        return inspection.document(proposal, rules) | {
            "state": self.visits.stands(known),
            "decided": known.standing.who,
            "stopped_by": known.standing.code,
            "approvals": len(known.standing.approvals),
            "needed": policy.officers_needed if policy.officers else None,
        }

    def check(self, request: Asked) -> Asked:
        """Rehearse a study on this site's data: what the policy will say, and what it would take.

        Raises:
            ContractError: if the data do not satisfy the contract.
        """
        known = self.plans.find(str(request["plan"]))
        self.plans.verify(known.proposal)  # before the training process builds what it names
        data = self.visits.described(known.proposal.plan)
        self.state["data"] = data._asdict()
        shown = self._shown(known)
        allowed = all(rule.ok for rule in inspection.rules(shown))
        spent = self.visits.spent_before(known.proposal.run, data.fingerprint)
        forecast = rehearse(self.visits, known, data, spent)._asdict() if allowed else None
        return shown | {"rows": data.rows, "notes": data.notes, "forecast": forecast}

    def approve(self, request: Asked) -> Asked:
        """Let a study run, by a person's word or an officer's signature.

        Raises:
            RefusedError: if the policy's other rules refuse it, or it takes officers to approve.
        """
        known, policy = self.plans.find(str(request["plan"])), self.config.policy
        shown = self._shown(known)
        refuse(inspection.rules(shown))
        self.plans.verify(known.proposal)
        if request.get("signature"):
            approval = Approval(officer=str(request["officer"]), signature=str(request["signature"]))
            known = self.plans.countersign(known, approval, policy)
        elif policy.officers:
            raise RefusedError(
                f"this site's policy takes {policy.officers_needed} officers' signatures: "
                "fedtailor client approve PLAN --key officer.key",
                code="officer",
            )
        else:
            known = self.plans.decide(known, "approved", str(request["who"]))
        self.wake()
        return self._shown(known)

    def refuse(self, request: Asked) -> Asked:
        """Say no to a study; what runs of it stops with the next visit."""
        known = self.plans.decide(self.plans.find(str(request["plan"])), "refused", str(request["who"]))
        return self._shown(known)

    def withdraw(self, request: Asked) -> Asked:
        """Take no further part in a study, or in any: refused from now on, and told to the coordinator."""
        return self._say("withdrawn", request)

    def back(self, request: Asked) -> Asked:
        """Undo a withdrawal. What ran before needs a new proposal."""
        return self._say("back", request)

    def _say(self, says: Literal["withdrawn", "back"], request: Asked) -> Asked:
        notice = self.visits.withdrawals.say(says, request.get("study"))
        self.wake()
        return {"state": notice.says, "study": notice.study, "notices": self.visits.withdrawals.rows()}

    def held(self, _: Asked) -> Asked:
        """Answers that wait for a person's release."""
        return {"rows": inbox.held(self.home.outbox)}

    def release(self, request: Asked) -> Asked:
        """Let one answer leave."""
        row = inbox.release(self.home.outbox, str(request["answer"]))
        self.wake()
        return row

    def receipts(self, request: Asked) -> Asked:
        """What shows that this site is in a run's model."""
        known = self.plans.find(str(request["plan"]))
        files = sorted((known.folder / "receipts").glob("*.json"))
        return {"run": known.proposal.run, "receipts": [json.loads(path.read_text()) for path in files]}
