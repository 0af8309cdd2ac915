"""A study as it is proposed to the sites: the plan, what code runs, and the exact list of what leaves; signed.

A site verifies it without a network: the key that signs is pinned when the site joins. Whatever a visit asks that is
not in the signed text is refused there. Names and numbers only, never code.
"""

import hashlib
import secrets
import time
from functools import lru_cache
from importlib import resources
from typing import Annotated, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, ValidationError, model_validator

from fedtailor import plugins
from fedtailor.config import build, readable
from fedtailor.errors import RefusedError
from fedtailor.leaving import Leaving, agreed
from fedtailor.plugins import Code
from fedtailor.recipe import Recipe
from fedtailor.seals import Public, canonical, genuine, sign, spelled
from fedtailor.study import Digest, Frozen, Name, Plan

DAY = 86_400
SLACK = 300  # seconds by which the clocks of two institutions may differ
PLUGIN = "plugin:"  # and a name: third-party code in a proposal's list


class Member(Frozen):
    """A site of the roster and its public key, which signs what it witnesses."""

    site: Name
    key: str


class Proposal(Frozen):
    """One run of a study, complete."""

    schema_: Literal["fedtailor.proposal/1"] = Field(default="fedtailor.proposal/1", alias="schema")
    run: Name
    plan: Plan
    code: dict[
        str, Digest
    ]  # what is installed at the coordinator: "recipe", "strategy", "training", "contract", "plugin:…"
    leaves: Leaving
    roster: tuple[Member, ...]
    nonce: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    created: int  # seconds since the epoch
    expires: int

    @model_validator(mode="after")
    def _the_roster_is_the_plans(self) -> "Proposal":
        if tuple(member.site for member in self.roster) != self.plan.sites:
            raise ValueError(f"roster: {[m.site for m in self.roster]} is not the plan's sites {list(self.plan.sites)}")
        if len({member.key for member in self.roster}) != len(self.roster):
            raise ValueError("roster: two sites have one key")
        return self

    def canonical(self) -> str:
        """The proposal as text: equal proposals give equal bytes."""
        return canonical(self.model_dump(mode="json", by_alias=True))

    def digest(self) -> str:
        """SHA-256 of :meth:`canonical`, hexadecimal: what a person approves."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()


class Signed(Frozen):
    """A proposal's canonical text and the coordinator's signature over it."""

    proposal: str
    signature: str


def propose(
    plan: Plan, run: str, keys: dict[str, Public], *, days: float = 30.0, leaves: Leaving | None = None
) -> Proposal:
    """Make a proposal of a plan, whose noise is resolved, for sites with these keys.

    ``leaves``: worked out by somebody else, because to do it takes modules of 70 MB. Each site compares it anyhow.
    """
    now = int(time.time())
    return Proposal(
        run=run,
        plan=plan,
        code=dict(code_of(plan.canonical())),
        leaves=leaves or agreed(plan.canonical()),
        roster=tuple(Member(site=site, key=spelled(keys[site])) for site in plan.sites),
        nonce=secrets.token_hex(16),
        created=now,
        expires=now + int(days * DAY),
    )


def signed(proposal: Proposal, key: Ed25519PrivateKey) -> str:
    """The proposal as it travels."""
    text = proposal.canonical()
    return Signed(proposal=text, signature=sign(key, "proposal", text)).model_dump_json()


def opened(text: str, key: Public) -> Proposal:
    """Verify what :func:`signed` made. Nothing of it is looked at before the signature is.

    Raises:
        RefusedError: code ``signature``, or ``plan`` where the signer signed what is no proposal.
    """
    try:
        document = Signed.model_validate_json(text)
    except ValidationError:
        raise RefusedError("there is no signed proposal", code="signature") from None
    if not genuine(key, "proposal", document.proposal, document.signature):
        raise RefusedError(
            "the proposal is not signed by the key that this site pinned when it joined (keys/plans.pub)",
            code="signature",
        )
    return parsed(document.proposal)


@lru_cache(maxsize=16)
def parsed(text: str) -> Proposal:
    """A proposal from its canonical text.

    Raises:
        RefusedError: code ``plan``.
    """
    try:
        proposal = Proposal.model_validate_json(text)
    except ValidationError as error:
        raise RefusedError(f"the proposal is malformed: {readable(error)}", code="plan") from error
    if proposal.canonical() != text:
        raise RefusedError("the proposal is not in canonical form", code="plan")
    return proposal


def fresh(proposal: Proposal, now: float) -> None:
    """Refuse what has expired or is not yet made.

    Raises:
        RefusedError: code ``expired``.
    """
    if now > proposal.expires:
        raise RefusedError(f"the proposal expired at {_date(proposal.expires)}; ask for a new one", code="expired")
    if now < proposal.created - SLACK:
        raise RefusedError(f"the proposal was made at {_date(proposal.created)}, which is not yet", code="expired")


def third_party(proposal: Proposal) -> list[Code]:
    """The plug-ins that a proposal runs, as they are installed here, or not. None of them is imported."""
    here = {plugin.name: plugin.code() for plugin in plugins.of(proposal.plan)}
    listed = (key.removeprefix(PLUGIN) for key in proposal.code if key.startswith(PLUGIN))
    return [here.get(name, Code(name)) for name in sorted({*here, *filter(plugins.NAME.fullmatch, listed)})]


def installed(proposal: Proposal) -> None:
    """Compare what the proposal says with what is installed here. It imports what the plan names: approve that first.

    Raises:
        RefusedError: code ``code`` where another program would run than the one proposed, ``leaves`` where what the
            installed strategy sends is not what the proposal lists.
    """
    here = dict(code_of(proposal.plan.canonical()))
    if different := sorted(
        name for name in here.keys() | proposal.code.keys() if here.get(name) != proposal.code.get(name)
    ):
        raise RefusedError(
            f"the proposal's {', '.join(different)} is not what is installed here; both sides need the same version",
            code="code",
        )
    if agreed(proposal.plan.canonical()) != proposal.leaves:
        raise RefusedError("the proposal's list of what leaves is not what its strategy sends", code="leaves")


CLIP = (
    "privacy/site_level.py",
    "privacy/adaptive.py",
)  # what a site does to its summand where it is the site that is hidden


@lru_cache(maxsize=16)
def code_of(plan_text: str) -> tuple[tuple[str, str], ...]:
    """SHA-256 of the files that give a plan its meaning, by what they define."""
    plan = Plan.parse(plan_text)
    recipe = build(plan.recipe, Recipe)
    return (
        ("recipe", _hash("recipes", "recipe.py", "contract.py", "adapters.py", "seeds.py")),
        ("strategy", _hash("strategies", "strategy.py", "packing.py")),
        ("training", _hash("training.py", "batches.py", "client/private_training.py", "client/work.py", *CLIP)),
        ("contract", hashlib.sha256(recipe.contract.encode()).hexdigest()),
        *((PLUGIN + plugin.name, plugin.sha256()) for plugin in plugins.of(plan)),
    )


def _hash(*names: str) -> str:
    """Over files of this package, and all Python files of a folder of it."""
    root, total = resources.files("fedtailor"), hashlib.sha256()
    for name in names:
        at = root.joinpath(name)
        files = (
            [at] if at.is_file() else sorted((f for f in at.iterdir() if f.name.endswith(".py")), key=lambda f: f.name)
        )
        for file in files:
            total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def _date(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
