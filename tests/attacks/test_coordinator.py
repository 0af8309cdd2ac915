"""A coordinator that has turned against a site: each move is tried with its defence and without.

The site's daemon and its confined training process are real. "Without" means that one check is taken out: then the site
trains and answers. Certificates, revoked sites, strangers and Flower's own tools are tried in tests/deployment.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from hub import Hub
from safetensors.torch import save
from turned import HUB, PLAN, Site

from fedtailor import proposal, wire
from fedtailor.client import plans, visits, warrants
from fedtailor.client.ledger import Reservation
from fedtailor.client.plans import Known, Plans, Standing
from fedtailor.client.visits import Visits
from fedtailor.config import load
from fedtailor.privacy.planning import resolve
from fedtailor.proposal import Proposal, Signed, parsed

PRIVATE = resolve(load(["study=heart", "sites=[a,b]", "quorum=1", "rounds=3"]).plan)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    it = Site(tmp_path_factory.mktemp("coordinator"))
    it.workshop.attack = "pass"
    yield it
    it.workshop.stop()
    it.ledger.close()


@pytest.fixture
def site(made):
    before = made.visits.config
    yield made
    made.visits.config = before


def private(**changed: Any):
    return PRIVATE.model_copy(update={"privacy": PRIVATE.privacy.model_copy(update=changed)})


class Move(NamedTuple):
    """What the coordinator does, what the site says to it, and the check that is in the way."""

    code: str
    asks: Callable[[Site], dict[str, Any]]  # arguments of Site.asked; "before": an honest visit first
    without: str  # of DEFENCES
    policy: dict[str, Any] = {}


def no_verdict(patch):
    patch.setattr(visits, "judged", lambda policy, plan, case: [])
    patch.setattr(Visits, "_reserve", lambda self, plan, visit, fingerprint: Reservation(0, bytes(32), None))
    patch.setattr(Visits, "_spent", lambda self, plan, visit: None)


def believing(patch):
    """The signed text is not verified, nor compared with what is known, installed or asked."""

    def take(self: Plans, visit: wire.Visit) -> Known:
        from fedtailor.study import Plan

        of = parsed(Signed.model_validate_json(visit.proposal).proposal)
        of = of.model_copy(update={"plan": Plan.parse(visit.plan)})
        folder = self.folder / of.run
        folder.mkdir(exist_ok=True)
        return Known(of, of.digest(), Standing(), folder)

    patch.setattr(Plans, "take", take)


DEFENCES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the policy": no_verdict,
    "the signed proposal": believing,
    "the proposal's time": lambda patch: patch.setattr(plans, "fresh", lambda of, now: None),
    "what it must show": lambda patch: patch.setattr(warrants, "check", lambda *arguments: None),
    "a person's approval": lambda patch: patch.setattr(visits, "refuse_unless_approved", lambda state, known: None),
    "the comparison of code": lambda patch: patch.setattr(plans, "installed", lambda of: None),
    "the hash of what was cast": lambda patch: patch.setattr(visits.store, "digest", lambda path: NAMED),
}
NAMED = "7" * 64


def fresh(site: Site, plan: Any = PLAN, **changed: Any) -> Proposal:
    return HUB.propose(plan, site.run()).model_copy(update=changed)


def after(site: Site, **fields: Any) -> dict[str, Any]:
    """Arguments of a second visit, after an honest first one of the same study."""
    of = fresh(site)
    assert site.asked(of).heads
    return {"of": of, **{"round": 1, **fields}}


def honest_then(site: Site, change: Callable[[Proposal], dict[str, Any]]) -> dict[str, Any]:
    asked = after(site)
    return {**asked, **change(asked["of"])}


def digest_of(site: Site) -> str:
    import hashlib

    return hashlib.sha256(site.cast).hexdigest()


def other_cast(site: Site) -> bytes:
    params = {
        name: leaf + 1 for name, leaf in __import__("safetensors.torch", fromlist=["load"]).load(site.cast).items()
    }
    return save(params)


SHIFT = 40 * proposal.DAY
MOVES: dict[str, Move] = {
    "epsilon of 1000": Move("budget", lambda s: {"of": fresh(s, private(epsilon=1000.0, noise_multiplier=0.41))}, "the policy", {"epsilon": 3.0}),
    "hardly any noise": Move("noise", lambda s: {"of": fresh(s, private(noise_multiplier=1e-6))}, "the policy"),
    "less noise than promised": Move("epsilon", lambda s: {"of": fresh(s, private(noise_multiplier=0.5))}, "the policy", {"epsilon": 1e6}),
    "a greater clip": Move("clip", lambda s: {"of": fresh(s, private(clip=3.0))}, "the policy", {"greatest_clip": 1.0}),
    "no privacy at all": Move("privacy", lambda s: {"of": fresh(s)}, "the policy", {"without_privacy": False}),
    "a great delta": Move("delta", lambda s: {"of": fresh(s, private(delta=0.05))}, "the policy"),
    "another study": Move("study", lambda s: {"of": fresh(s, PLAN.model_copy(update={"study": "everything"}))}, "the policy"),
    "more rounds than allowed": Move("rounds", lambda s: {"of": fresh(s)}, "the policy", {"max_rounds": 2}),
    "a study with strangers": Move("partners", lambda s: {"of": fresh(s)}, "the policy", {"partners": ("c",)}),
    "a quorum of one": Move("cohort", lambda s: {"of": fresh(s)}, "the policy", {"minimum_cohort": 2}),
    "no approval": Move("pending", lambda s: {"of": fresh(s)}, "a person's approval", {"approval": "person"}),
    "rounds beyond the plan": Move("rounds", lambda s: {"of": fresh(s), "round": 3}, "what it must show"),
    "a plan without a signature": Move("signature", lambda s: (lambda of: {"of": of, "proposal": json.dumps({"proposal": of.canonical(), "signature": ""})})(fresh(s)), "the signed proposal"),
    "a plan that somebody else signed": Move("signature", lambda s: (lambda of: {"of": of, "proposal": proposal.signed(of, Hub("a").key)})(fresh(s)), "the signed proposal"),
    "an expired plan": Move("expired", lambda s: (lambda of: {"of": of.model_copy(update={"created": of.created - SHIFT, "expires": of.expires - SHIFT})})(fresh(s)), "the proposal's time"),
    "an override beside the signed plan": Move("changed", lambda s: {"of": fresh(s), "plan": PLAN.model_copy(update={"local": PLAN.local.model_copy(update={"lr": 0.7})}).canonical()}, "the signed proposal"),
    "another plan in mid-study": Move("changed", lambda s: honest_then(s, lambda of: {"of": HUB.propose(PLAN.model_copy(update={"rounds": 9}), of.run)}), "the signed proposal"),
    "the roster minus one in mid-study": Move("changed", lambda s: honest_then(s, lambda of: {"of": HUB.propose(PLAN.model_copy(update={"sites": ("a",)}), of.run)}), "the signed proposal"),
    "an old plan for a new run": Move("changed", lambda s: (lambda of: {"of": of, "run": s.run()})(fresh(s)), "the signed proposal"),
    "other code than is installed": Move("code", lambda s: (lambda of: {"of": of.model_copy(update={"code": of.code | {"recipe": "0" * 64}})})(fresh(s)), "the comparison of code"),
    "a list of more than leaves": Move("leaves", lambda s: (lambda of: {"of": of.model_copy(update={"leaves": of.leaves.model_copy(update={"bytes": 10**9})})})(fresh(s)), "the comparison of code"),
    "a round again with another model": Move("replayed", lambda s: {**after(s, round=0), "cast": other_cast(s)}, "what it must show"),
    "two models to two sites": Move("split", lambda s: honest_then(s, lambda of: {"witnesses": HUB.witnesses(of, 0, digest_of(s)) | {"b": HUB.witnesses(of, 0, NAMED)["b"]}}), "what it must show"),
    "a cohort of none": Move("cohort", lambda s: after(s, witnesses={}), "what it must show"),
    "a visit that is not signed": Move("seal", lambda s: {"of": fresh(s), "seal": ""}, "what it must show"),
    "another model than is named": Move("cast", lambda s: {"of": fresh(s), "cast_sha256": NAMED}, "the hash of what was cast"),
}  # fmt: skip


def with_policy(site: Site, **changed: Any) -> None:
    policy = site.config.policy.model_copy(update=changed)
    site.visits.config = site.config.model_copy(update={"policy": policy})


@pytest.mark.parametrize("name", MOVES)
def test_a_move_is_refused_and_would_work_without_its_defence(site, name, monkeypatch):
    move = MOVES[name]
    asked = move.asks(site)  # what comes before it is honest
    with_policy(site, **move.policy)
    left = site.asked(**asked)
    assert (left.heads, left.words) == ([], [move.code])
    asked = move.asks(site) if "before" not in name and "mid-study" not in name else asked
    with monkeypatch.context() as patch:
        DEFENCES[move.without](patch)
        left = site.asked(**asked)
    assert len(left.heads) == 1 and left.words == [], left.words
