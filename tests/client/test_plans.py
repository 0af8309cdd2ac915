"""The book of plans: what is signed is what runs, for the run it was signed for, and with whom."""

import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hub import Hub
from pydantic import ValidationError

from fedtailor import proposal, seals
from fedtailor.client.plans import Approval, approves, refuse_unless_approved
from fedtailor.config import load
from fedtailor.errors import ConfigError, RefusedError, StoreError
from fedtailor.leaving import Tensor
from fedtailor.policy import Policy
from fedtailor.privacy.planning import resolve
from fedtailor.study import Plan

PLAN = resolve(load(["study=heart", "sites=[a,b]", "quorum=1", "rounds=3"]).plan)
POLICY = Policy(studies=("heart",), epsilon=8.0, delta=1e-4)
HUB = Hub("a", "b")


@pytest.fixture
def book(tmp_path):
    return HUB.plans(tmp_path / "plans", "a")


def refused(book, of, **changed):
    with pytest.raises(RefusedError) as error:
        book.take(HUB.visit(of, **changed))
    return error.value.code


def test_a_proposal_is_put_on_file_and_found_again(book):
    of = HUB.propose(PLAN)
    known = book.take(HUB.visit(of))
    assert known.proposal == of and known.digest == of.digest() and known.standing.state == "pending"
    assert book.find("r") == book.find(of.digest()[:8]) == known and list(book.all()) == [known]


@pytest.mark.parametrize(
    ("code", "changed"),
    [
        ("signature", {"proposal": ""}),
        ("signature", {"proposal": "{}"}),
        ("signature", {"proposal": proposal.signed(HUB.propose(PLAN), Ed25519PrivateKey.generate())}),
        ("changed", {"run": "other"}),
        ("changed", {"plan": PLAN.model_copy(update={"seed": 1}).canonical()}),
        ("changed", {"plan": "{}"}),
    ],
)
def test_what_is_not_in_the_signed_text_is_refused(book, code, changed):
    assert refused(book, HUB.propose(PLAN), **changed) == code and list(book.all()) == []


def test_a_signed_text_that_is_changed_by_a_character_is_refused(book):
    signed = json.loads(proposal.signed(HUB.propose(PLAN), HUB.key))
    signed["proposal"] = signed["proposal"].replace('"rounds":3', '"rounds":4')
    assert refused(book, HUB.propose(PLAN), proposal=json.dumps(signed)) == "signature"


def test_a_text_that_is_not_canonical_is_refused(book):
    """Two texts of one meaning would have two hashes, and a person approves one."""
    text = HUB.propose(PLAN).canonical() + " "
    loose = json.dumps({"proposal": text, "signature": seals.sign(HUB.key, "proposal", text)})
    assert refused(book, HUB.propose(PLAN), proposal=loose) == "plan"


def test_a_signature_for_another_purpose_is_refused(book):
    text = HUB.propose(PLAN).canonical()
    other = json.dumps({"proposal": text, "signature": seals.sign(HUB.key, "visit", text)})
    assert refused(book, HUB.propose(PLAN), proposal=other) == "signature"


def test_a_run_has_one_proposal_for_ever(book):
    book.take(HUB.visit(HUB.propose(PLAN)))
    assert refused(book, HUB.propose(PLAN)) == "changed"  # only its nonce differs
    more = PLAN.model_copy(update={"rounds": 4})
    assert refused(book, HUB.propose(more)) == "changed"
    assert len(list(book.all())) == 1


@pytest.mark.parametrize("begin,code", [(-40, "expired"), (1, "expired"), (-29, None)])
def test_a_proposal_has_its_time(book, begin, code):
    of = HUB.propose(PLAN)
    shift = int(begin * proposal.DAY)
    moved = of.model_copy(update={"created": of.created + shift, "expires": of.expires + shift})
    if code:
        assert refused(book, moved) == code
    else:
        assert book.take(HUB.visit(moved)).proposal == moved


def test_a_site_that_is_not_in_the_roster_takes_no_part(book):
    stranger = Hub("a", "b")
    of = HUB.propose(PLAN).model_copy(update={"roster": stranger.propose(PLAN).roster})
    assert refused(book, of) == "roster"  # its name, but not its key


@pytest.mark.parametrize("part", ["recipe", "strategy", "training", "contract"])
def test_other_code_than_was_proposed_does_not_run(book, part):
    of = HUB.propose(PLAN)
    assert refused(book, of.model_copy(update={"code": of.code | {part: "0" * 64}})) == "code"
    assert refused(book, of.model_copy(update={"code": {k: v for k, v in of.code.items() if k != part}})) == "code"


def test_a_list_of_what_leaves_that_is_not_the_strategys_is_refused(book):
    of = HUB.propose(PLAN)
    longer = of.leaves.model_copy(update={"bytes": of.leaves.bytes + 1})
    more = of.leaves.model_copy(
        update={"tensors": (*of.leaves.tensors, of.leaves.tensors[0].model_copy(update={"name": "rows"}))}
    )
    assert refused(book, of.model_copy(update={"leaves": longer})) == "leaves"
    assert refused(book, of.model_copy(update={"leaves": more})) == "leaves"


# --- approval ---


def officers(n):
    keys = [Ed25519PrivateKey.generate() for _ in range(n)]
    return keys, tuple(seals.spelled(key.public_key()) for key in keys)


def signed_by(key, digest, site="a"):
    return Approval(
        officer=seals.spelled(key.public_key()), signature=seals.sign(key, "approval", approves(site, digest))
    )


def test_two_of_three_officers_approve_by_the_hash(book):
    keys, names = officers(3)
    policy = POLICY.model_copy(update={"officers": names, "officers_needed": 2})
    known = book.take(HUB.visit(HUB.propose(PLAN)))
    book.decide(known, "approved", "root")  # a person's word is not enough here
    assert book.stands(book.find("r"), policy) == "pending"
    for _ in range(2):  # nor one officer twice
        known = book.countersign(book.find("r"), signed_by(keys[0], known.digest), policy)
        assert book.stands(known, policy) == "pending"
    known = book.countersign(known, signed_by(keys[2], known.digest), policy)
    assert book.stands(known, policy) == "approved"
    fewer = policy.model_copy(update={"officers": names[:2]})  # who is no longer an officer no longer counts
    assert book.stands(book.find("r"), fewer) == "pending"


def test_an_approval_is_of_one_plan_at_one_site_by_an_officer(book):
    keys, names = officers(2)
    policy = POLICY.model_copy(update={"officers": names[:1]})
    known = book.take(HUB.visit(HUB.propose(PLAN)))
    for wrong in (
        signed_by(keys[1], known.digest),
        signed_by(keys[0], "0" * 64),
        signed_by(keys[0], known.digest, site="b"),
        signed_by(keys[0], known.digest).model_copy(update={"signature": "zz"}),
    ):
        with pytest.raises(RefusedError) as error:
            book.countersign(known, wrong, policy)
        assert error.value.code == "officer"
    assert book.stands(book.find("r"), policy) == "pending"


def test_approvals_that_were_written_by_hand_do_not_count(book):
    _, names = officers(1)
    policy = POLICY.model_copy(update={"officers": names})
    known = book.take(HUB.visit(HUB.propose(PLAN)))
    forged = {"state": "approved", "approvals": [{"officer": names[0], "signature": "00"}]}
    (known.folder / "standing.json").write_text(json.dumps(forged))
    assert book.stands(book.find("r"), policy) == "pending"


@pytest.mark.parametrize("state", ["pending", "refused", "stopped", "withdrawn"])
def test_only_what_is_approved_runs(book, state):
    known = book.take(HUB.visit(HUB.propose(PLAN)))
    with pytest.raises(RefusedError) as error:
        refuse_unless_approved(state, known)
    assert error.value.code == state
    refuse_unless_approved("approved", known)


def test_a_no_outlasts_a_policy_that_asks_nobody(book):
    by_policy = POLICY.model_copy(update={"approval": "policy"})
    known = book.take(HUB.visit(HUB.propose(PLAN)))
    assert book.stands(known, by_policy) == "approved"
    assert book.stands(book.decide(known, "refused", "ann"), by_policy) == "refused"


# --- the file ---


def test_a_damaged_book_is_named_and_nothing_runs(book):
    known = book.take(HUB.visit(HUB.propose(PLAN)))
    for name in ("standing.json", "proposal.json", "casts.json"):
        path = known.folder / name
        before = path.read_bytes() if path.exists() else None
        path.write_text("{")
        with pytest.raises(StoreError, match=name):
            book.take(HUB.visit(known.proposal)).casts()
        path.unlink() if before is None else path.write_bytes(before)


@pytest.mark.parametrize("word", ["", "zz", "no-such-run"])
def test_a_plan_that_is_not_there_is_named(book, word):
    known = book.take(HUB.visit(HUB.propose(PLAN)))
    with pytest.raises(ConfigError, match=known.digest[:12]):
        book.find(word)


def test_numbers_of_which_nothing_can_be_made_are_a_refusal_and_no_crash(book):
    """A signed proposal's plan is the coordinator's: what leaves need not even have been worked out there."""
    honest = resolve(load(["study=heart", "sites=[a,b]", "quorum=1", "privacy=none", "recipe=heart_mlp"]).plan)
    recipe = honest.recipe.model_dump(by_alias=True) | {"hidden": 10**30}  # no torch tensor has such a size
    of = HUB.propose(honest)
    hostile = of.model_copy(update={"plan": Plan.model_validate(honest.model_dump(by_alias=True) | {"recipe": recipe})})
    assert refused(book, hostile) == "plan" and list(book.all()) == []


@pytest.mark.parametrize(
    "beyond",
    [{"rounds": 10**6}, {"local": {"steps": 10**9, "rate": 0.1, "lr": 1}}, {"sites": [f"s{i}" for i in range(10_001)]}],
)
def test_a_plan_whose_cost_could_not_be_worked_out_is_none(beyond):
    with pytest.raises(ValidationError):
        Plan.model_validate(PLAN.model_dump(by_alias=True) | beyond)


@pytest.mark.parametrize("bad", [{"dtype": "load"}, {"dtype": "nope"}, {"shape": (2**41,)}, {"shape": (1,) * 17}])
def test_a_list_of_what_leaves_names_tensors_that_there_are(bad):
    with pytest.raises(ValidationError):
        Tensor.model_validate({"name": "w", "dtype": "float32", "shape": (1,)} | bad)
