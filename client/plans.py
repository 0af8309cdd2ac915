"""The studies that were proposed to this site, where each stands, and what each has shown so far. All of it is on disk.

A proposal is kept under the name of its run, and a run has one proposal for ever: a changed one is refused. Nothing of
a study runs here before it is approved: by the policy alone, by a person, or by n of m officers who sign its hash.
"""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fedtailor import store
from fedtailor.errors import ConfigError, FedtailorError, RefusedError, StoreError
from fedtailor.policy import Policy, Rule, judge_plugins, refuse
from fedtailor.proposal import Proposal, fresh, installed, opened, parsed, third_party
from fedtailor.receipts import Receipt
from fedtailor.seals import Public, canonical, genuine, public, spelled
from fedtailor.study import Frozen
from fedtailor.wire import Visit

MOST = 10_000  # proposals on file: a coordinator must not fill the disk with them
State = Literal["pending", "approved", "refused", "stopped", "withdrawn"]


class Approval(Frozen):
    """An officer's signature for the purpose "approval" over :func:`approves`."""

    officer: str
    signature: str


class Standing(Frozen):
    """Where a study stands at this site."""

    state: State = "pending"
    who: str = ""  # last decided
    code: str = ""  # why it was stopped
    approvals: tuple[Approval, ...] = ()


class Known(NamedTuple):
    """A proposal and where it stands."""

    proposal: Proposal
    digest: str
    standing: Standing
    folder: Path

    def casts(self) -> dict[int, str]:
        """SHA-256 of what was cast in each round, as this site was shown it."""
        return self._rounds("casts")

    def answers(self) -> dict[int, str]:
        """SHA-256 of what this site answered in each round that trained."""
        return self._rounds("answers")

    def note_cast(self, round: int, cast_sha256: str) -> None:
        """Remember what was cast, before anything is done with it."""
        self._note("casts", round, cast_sha256)

    def note_answer(self, round: int, summand_sha256: str) -> None:
        """Remember what is answered, before it leaves."""
        self._note("answers", round, summand_sha256)

    def _rounds(self, what: str) -> dict[int, str]:
        path = self.folder / f"{what}.json"
        try:
            return {int(k): str(v) for k, v in json.loads(path.read_text()).items()} if path.exists() else {}
        except (OSError, ValueError, AttributeError) as error:
            raise StoreError(f"{path} cannot be read ({error}); restore it, or refuse the study") from error

    def _note(self, what: str, round: int, digest: str) -> None:
        known = self._rounds(what)
        if known.get(round) != digest:
            store.write_json(self.folder / f"{what}.json", {str(k): v for k, v in {**known, round: digest}.items()})

    def keep(self, receipt: Receipt, seal: str) -> None:
        """Keep a receipt of the coordinator's."""
        folder = self.folder / "receipts"
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / f"{receipt.round:06d}.json"
        if not path.exists():
            store.write_json(path, {"receipt": receipt.text(), "seal": seal})


def _sound(proposal: Proposal) -> None:
    """What is installed gives the proposal the meaning that it claims.

    Raises:
        RefusedError: ``code``, ``leaves``; ``plan`` where its numbers are such that nothing can be made of it.
    """
    try:
        installed(proposal)
    except FedtailorError:
        raise
    except Exception as error:  # an overflow, say: the numbers are the coordinator's, and must not stop this daemon
        raise RefusedError(f"nothing can be made of the plan: {type(error).__name__}: {error}", code="plan") from error


def approves(site: str, digest: str) -> str:
    """What an officer signs."""
    return canonical([site, digest])


class Plans:
    """The book of proposals in ``folder``.

    Args:
        signer: the coordinator's key, pinned when the site joined.
        own: this site's public key.
        approved: the plug-ins that the site's policy approves; None: none.
    """

    def __init__(
        self, folder: Path, site: str, signer: Public, own: Public, approved: Mapping[str, str] | None = None
    ) -> None:
        self.folder, self.site, self.signer, self.own = folder, site, signer, own
        self.approved = approved or {}
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def take(self, visit: Visit) -> Known:
        """The proposal by which a visit comes, verified; a new one is put on file.

        One that runs a plug-in that is not approved is put on file too, for people to see, and refused.

        Raises:
            RefusedError: ``signature``, ``plan``, ``expired``, ``roster``, ``plugin``, ``code``, ``leaves``, or ``changed``
                where the visit or the proposal is not what was proposed for this run.
        """
        proposal = opened(visit.proposal, self.signer)
        digest = proposal.digest()
        folder = self.folder / proposal.run
        if (folder / "proposal.json").exists() and self._read(folder).digest() != digest:
            raise RefusedError(f"run {proposal.run!r} was proposed with another plan before", code="changed")
        if (visit.run, visit.plan) != (proposal.run, proposal.plan.canonical()):
            raise RefusedError("the visit is not of the run and plan in its signed proposal", code="changed")
        fresh(proposal, time.time())
        if (self.site, spelled(self.own)) not in [(m.site, m.key) for m in proposal.roster]:
            raise RefusedError("this site and its key are not in the proposal's roster", code="roster")
        if foreign := self._foreign(proposal):
            self._file(folder, visit.proposal, proposal)
            refuse(foreign)
        _sound(proposal)
        self._file(folder, visit.proposal, proposal)
        return Known(proposal, digest, self._standing(folder), folder)

    def verify(self, proposal: Proposal) -> None:
        """Compare a proposal with what is installed here, which imports what it names: after its plug-ins are approved.

        Raises:
            RefusedError: ``plugin``, ``code``, ``leaves``.
        """
        refuse(self._foreign(proposal))
        _sound(proposal)

    def _foreign(self, proposal: Proposal) -> list[Rule]:
        """The rules for plug-ins, if one of them does not hold."""
        rules = judge_plugins(self.approved, third_party(proposal))
        return [] if all(rule.ok for rule in rules) else rules

    def _file(self, folder: Path, signed: str, proposal: Proposal) -> None:
        if not (folder / "proposal.json").exists():
            if sum(1 for _ in self.folder.iterdir()) >= MOST:
                raise RefusedError(f"{MOST} proposals are on file; remove old ones from {self.folder}", code="plan")
            folder.mkdir(mode=0o700, exist_ok=True)
            store.write_text(folder / "signed.json", signed)
            store.write_text(folder / "proposal.json", proposal.canonical())

    def all(self) -> Iterator[Known]:
        """Every proposal on file, the newest first."""
        found = [self._known(path.parent) for path in self.folder.glob("*/proposal.json")]
        yield from sorted(found, key=lambda known: -known.proposal.created)

    def find(self, word: str) -> Known:
        """A proposal by its run or the beginning of its hash.

        Raises:
            ConfigError: if there is none, or more than one.
        """
        found = [
            known for known in self.all() if known.proposal.run == word or (word and known.digest.startswith(word))
        ]
        if len(found) != 1:
            listed = ", ".join(f"{k.digest[:12]} ({k.proposal.run})" for k in self.all()) or "none yet"
            many = "fits more than one" if found else "is none"
            raise ConfigError(f"plan {word!r} {many} of those on file: {listed}")
        return found[0]

    def decide(self, known: Known, state: State, who: str, code: str = "") -> Known:
        """Record a decision. What officers have signed before is dropped unless it is approved."""
        approvals = known.standing.approvals if state == "approved" else ()
        return self._write(known, Standing(state=state, who=who, code=code, approvals=approvals))

    def countersign(self, known: Known, approval: Approval, policy: Policy) -> Known:
        """Add an officer's signature.

        Raises:
            RefusedError: code ``officer``, if the officer is not in the policy or the signature is not over this plan.
        """
        if approval.officer not in policy.officers:
            raise RefusedError("that officer's key is not in policy.officers", code="officer")
        if not genuine(public(approval.officer), "approval", approves(self.site, known.digest), approval.signature):
            raise RefusedError("the officer's signature is not over this plan's hash and this site", code="officer")
        others = [one for one in known.standing.approvals if one.officer != approval.officer]
        standing = Standing(state="approved", who="officers", approvals=(*others, approval))
        return self._write(known, standing)

    def stands(self, known: Known, policy: Policy) -> State:
        """Where a study stands under the policy as it is now."""
        standing = known.standing
        if standing.state in ("refused", "stopped", "withdrawn"):
            return standing.state
        if policy.approval == "policy":
            return "approved"
        if policy.officers:
            words = approves(self.site, known.digest)
            valid = {
                one.officer
                for one in standing.approvals
                if one.officer in policy.officers and genuine(public(one.officer), "approval", words, one.signature)
            }
            return "approved" if len(valid) >= policy.officers_needed else "pending"
        return standing.state

    def _write(self, known: Known, standing: Standing) -> Known:
        store.write_text(known.folder / "standing.json", standing.model_dump_json())
        return known._replace(standing=standing)

    def _known(self, folder: Path) -> Known:
        proposal = self._read(folder)
        return Known(proposal, proposal.digest(), self._standing(folder), folder)

    def _read(self, folder: Path) -> Proposal:
        try:
            return parsed((folder / "proposal.json").read_text())
        except (OSError, UnicodeDecodeError, RefusedError) as error:
            raise StoreError(f"{folder / 'proposal.json'} cannot be read ({error}); restore it") from error

    def _standing(self, folder: Path) -> Standing:
        path = folder / "standing.json"
        try:
            return Standing.model_validate_json(path.read_text()) if path.exists() else Standing()
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} cannot be read; decide anew with approve or refuse") from error


def refuse_unless_approved(state: State, known: Known) -> None:
    """Raise unless a study may run here.

    Raises:
        RefusedError: with the state as its code.
    """
    run, why = known.proposal.run, {
        "pending": f"waits for approval: fedtailor client approve {known.digest[:12]}",
        "refused": f"was refused by {known.standing.who}",
        "stopped": f"was stopped here by the airlock ({known.standing.code}); approve it again to let it go on",
        "withdrawn": "this site has withdrawn",
    }  # fmt: skip
    if state != "approved":
        raise RefusedError(f"{run}: {why[state]}", code=state)


def as_row(known: Known, state: State) -> dict[str, Any]:
    """One line of ``fedtailor client plans``."""
    plan = known.proposal.plan
    return {"hash": known.digest[:12], "run": known.proposal.run, "study": plan.study, "state": state,
            "rounds": plan.rounds, "epsilon": plan.record.epsilon if plan.record else None,
            "sites": list(plan.sites), "expires": known.proposal.expires}  # fmt: skip
