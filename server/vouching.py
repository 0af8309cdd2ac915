"""What the coordinator shows its sites, so that they need not trust it: signed visits, witnesses, receipts, ledger heads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from fedtailor import receipts, seals, store
from fedtailor.errors import WireError
from fedtailor.proposal import Proposal
from fedtailor.receipts import Head, Leaf
from fedtailor.wire import Report, Visit


class Last(NamedTuple):
    """What is kept of a closed round, to be shown to a site that is asked the next time."""

    round: int
    cast_sha256: str
    witnesses: dict[str, str] = {}  # site -> its signature
    leaves: tuple[tuple[str, str, str], ...] = ()  # site, summand_sha256, salt

    def root(self) -> str:
        """Of the receipts' tree."""
        return receipts.root_of([Leaf(*leaf) for leaf in self.leaves]) if self.leaves else ""


class Heads:
    """The last entry that each site showed of its ledger, across all studies: a file a site."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def get(self, site: str) -> Head | None:
        """The last that was shown; None where the site showed none, or the file is lost."""
        try:
            return Head.model_validate_json((self.folder / f"{site}.json").read_text())
        except (OSError, ValidationError):
            return None

    def note(self, site: str, head: Head, known: Head | None) -> None:
        """Keep a site's head, unless ``known`` is a later one."""
        if known is None or known.count < head.count:
            store.write_text(self.folder / f"{site}.json", head.model_dump_json())


class Vouch:
    """The coordinator's word on one run."""

    def __init__(self, signed: str, proposal: Proposal, key: Ed25519PrivateKey, heads: Heads) -> None:
        self.signed, self.proposal, self.key, self.heads = signed, proposal, key, heads
        self.keys = {member.site: seals.public(member.key) for member in proposal.roster}
        self.digest = proposal.digest()

    def visits(self, visit: Visit, lasts: Sequence[Last]) -> dict[str, Visit]:
        """``visit`` as each site is sent it, with what is kept of the round of its turn before."""
        shown: dict[str, object] = {"proposal": self.signed, "seal": seals.sign(self.key, "visit", visit.sealed())}
        heads = {site: head for site in self.keys if (head := self._head(site)) is not None}
        by_round = {last.round: (last, self._receipts(last, heads)) for last in lasts}
        made = {}
        for site in self.keys:
            own: dict[str, object] = {"head": heads.get(site)}
            before = self.proposal.plan.previous(site, visit.round)
            if before is not None and before in by_round:
                last, given = by_round[before]
                own |= {"before": last.cast_sha256, "witnesses": last.witnesses}
                if site in given:
                    own |= {"receipt": given[site], "receipt_seal": seals.sign(self.key, "receipt", given[site].text())}
            made[site] = visit.model_copy(update=shown | own)
        return made

    def _receipts(self, last: Last, heads: dict[str, Head]) -> dict[str, receipts.Receipt]:
        return receipts.receipts(
            self.proposal.run, self.digest, last.round, [Leaf(*leaf) for leaf in last.leaves], heads
        )

    def check(self, site: str, report: Report, visit: Visit) -> None:
        """A report must carry its site's witness of what was cast, and a ledger head that the site signed.

        Raises:
            WireError: code ``witness`` or ``head``.
        """
        asks = visit.train or visit.evaluate or visit.baseline
        if asks and not seals.genuine(self.keys[site], "witness", visit.witnessed(), report.witness or ""):
            raise WireError("the site does not witness what was cast", code="witness")
        if report.head is not None:
            if not seals.genuine(self.keys[site], "ledger-head", report.head.text(), report.head.signature):
                raise WireError("a ledger head that the site did not sign", code="head")
            self.heads.note(site, report.head, self._head(site))

    def _head(self, site: str) -> Head | None:
        """A site's last head; none where it joined anew since, with another key: it would not know it for its own."""
        head = self.heads.get(site)
        ours = head is not None and seals.genuine(self.keys[site], "ledger-head", head.text(), head.signature)
        return head if ours else None


def last_of(visit: Visit, reports: dict[str, Report]) -> Last:
    """What to keep of a round that was closed with these reports; a late one witnesses another round's model."""
    ordered = sorted(reports.items())
    fresh = [(site, report) for site, report in ordered if report.round == visit.round]
    witnesses = {site: report.witness for site, report in fresh if report.witness is not None}
    return Last(visit.round, visit.cast_sha256, witnesses, tuple((s, r.summand_sha256, r.salt) for s, r in ordered))


def lasts_from(raw: object) -> tuple[Last, ...]:
    """What :func:`last_of` made in some rounds, as it comes from a checkpoint's JSON; older ones hold that of one round."""
    rows = json.loads(json.dumps(raw or []))
    if rows and isinstance(rows[0], int):
        rows = [rows]
    return tuple(
        Last(round, cast, witnesses, tuple((a, b, c) for a, b, c in leaves)) for round, cast, witnesses, leaves in rows
    )
