"""What a coordinator must show for a visit, beside a signed proposal that is approved: one model a round, the same for
all, and the site's own ledger as it was. A coordinator that cheats on one of these is refused, and its signature proves it.
"""

from fedtailor.client.ledger import Ledger
from fedtailor.client.plans import Known
from fedtailor.errors import RefusedError
from fedtailor.policy import Policy
from fedtailor.seals import Public, genuine, public, spelled
from fedtailor.wire import Visit, witnessed


def check(visit: Visit, known: Known, policy: Policy, signer: Public, own: Public, ledger: Ledger) -> None:
    """Compare a visit with what this site has been shown before, and with what the other sites say.

    Raises:
        RefusedError: ``seal`` where the coordinator did not sign the visit; ``rounds`` beyond the plan; ``replayed``
            where a round comes again with another model, or after a later one; ``split`` where other sites were shown
            another model; ``cohort`` where too few sites witness the one of this site's turn before; ``receipt``
            or ``ledger-head`` where one does not verify; ``rolled-back`` where this site's ledger is an older copy.
    """
    if not genuine(signer, "visit", visit.sealed(), visit.seal):
        raise RefusedError("the visit is not signed by the coordinator", code="seal")
    plan, casts = known.proposal.plan, known.casts()
    if visit.round > plan.rounds or (visit.train and visit.round == plan.rounds):
        raise RefusedError(f"round {visit.round}: the plan has {plan.rounds} rounds", code="rounds")
    if visit.round < max(casts, default=0):
        raise RefusedError(f"round {visit.round} comes after round {max(casts)}", code="replayed")
    if casts.get(visit.round, visit.cast_sha256) != visit.cast_sha256:
        raise RefusedError(f"round {visit.round} comes again with another model", code="replayed")
    site = next(member.site for member in known.proposal.roster if member.key == spelled(own))
    if (before := plan.previous(site, visit.round)) is not None:
        _witnesses(visit, known, policy, casts, before)
    _receipt(visit, known, signer, site)
    _head(visit, own, ledger)


def _witnesses(visit: Visit, known: Known, policy: Policy, casts: dict[int, str], before: int) -> None:
    """Round ``before``, this site's last turn, must have been one round: enough sites, all of which saw one model."""
    if visit.before is None or casts.get(before, visit.before) != visit.before:
        raise RefusedError(f"round {before} had another model for this site than for the others", code="split")
    text = witnessed(visit.run, before, visit.before)
    keys = {member.site: member.key for member in known.proposal.roster}
    for site, signature in visit.witnesses.items():
        if site not in keys or not genuine(public(keys[site]), "witness", text, signature):
            raise RefusedError(f"{site} did not witness the model of round {before}", code="split")
    least = max(known.proposal.plan.quorum, policy.minimum_cohort)
    if len(visit.witnesses) < least:
        raise RefusedError(
            f"{len(visit.witnesses)} sites witness round {before}; this study needs {least} behind a round",
            code="cohort",
        )


def _receipt(visit: Visit, known: Known, signer: Public, site: str) -> None:
    """A receipt is for this site's own answer, as it was sent."""
    receipt = visit.receipt
    if receipt is None:
        return
    answered, buffer = known.answers(), known.proposal.plan.buffer
    late = 0 if buffer is None else buffer.oldest  # an answer may count in a later round
    rounds = [round for round in answered if 0 <= receipt.round - round <= late]
    ours = (receipt.run, receipt.proposal, receipt.site) == (visit.run, known.digest, site)
    ours = ours and receipt.summand_sha256 in [answered[round] for round in rounds]
    if not (ours and receipt.holds() and genuine(signer, "receipt", receipt.text(), visit.receipt_seal)):
        raise RefusedError("a receipt that does not verify", code="receipt")
    known.keep(receipt, visit.receipt_seal)


def _head(visit: Visit, own: Public, ledger: Ledger) -> None:
    """The coordinator shows the last entry that it saw of this site's ledger: it must still be there."""
    head = visit.head
    if head is None:
        return
    if not genuine(own, "ledger-head", head.text(), head.signature):
        raise RefusedError(
            "the coordinator shows an entry of this ledger that this site did not sign", code="ledger-head"
        )
    if not ledger.contains((head.count, head.hash)):
        raise RefusedError(
            f"ledger: entry {head.count}, which this site once showed, is not in it: an older copy was put back. "
            "Restore the newest copy; until then nothing may train, because spent budget would be spent again",
            code="rolled-back",
        )
