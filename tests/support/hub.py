"""A coordinator of a test's own: it signs whatever it is told to, honest or not."""

import hashlib

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtailor import proposal, seals
from fedtailor.client.plans import Plans
from fedtailor.proposal import Proposal
from fedtailor.study import Plan
from fedtailor.wire import Visit, witnessed


class Hub:
    """The consortium's signing key, and a key for each site."""

    def __init__(self, *sites: str) -> None:
        self.key = Ed25519PrivateKey.generate()
        self.keys = {site: ec.generate_private_key(ec.SECP384R1()) for site in sites}

    def propose(self, plan: Plan, run: str = "r", **changed: object) -> Proposal:
        public = {site: self.keys[site].public_key() for site in plan.sites}
        return proposal.propose(plan, run, public).model_copy(update=changed)

    def visit(self, of: Proposal, *, cast: bytes = b"cast", **fields: object) -> Visit:
        """A visit as an honest coordinator makes it, but for what ``fields`` say; ``cast`` is for every round."""
        digest = hashlib.sha256(cast).hexdigest()
        asked = {"run": of.run, "round": 0, "train": True, "evaluate": False, "baseline": False,
                 "plan": of.plan.canonical(), "cast_sha256": digest, "proposal": proposal.signed(of, self.key)}  # fmt: skip
        made = Visit.model_validate(asked | {k: v for k, v in fields.items() if k in asked})
        shown: dict[str, object] = {"seal": seals.sign(self.key, "visit", made.sealed())}
        if made.round:
            shown |= {"before": digest, "witnesses": self.witnesses(of, made.round - 1, digest)}
        return made.model_copy(update=shown | {k: v for k, v in fields.items() if k not in asked})

    def witnesses(self, of: Proposal, round: int, digest: str) -> dict[str, str]:
        """What the sites sign of an honest round."""
        text = witnessed(of.run, round, digest)
        return {site: seals.sign(self.keys[site], "witness", text) for site in of.plan.sites}

    def plans(self, folder, site: str) -> Plans:
        """A site's book of plans that has pinned this coordinator's key."""
        return Plans(folder, site, self.key.public_key(), self.keys[site].public_key())
