"""Receipts: for this site's own answer, signed by the coordinator, and kept; anything else is refused."""

import hashlib

import pytest
from hub import Hub

from fedtailor import seals
from fedtailor.client import warrants
from fedtailor.client.ledger import Ledger
from fedtailor.config import load
from fedtailor.errors import RefusedError
from fedtailor.policy import Policy
from fedtailor.privacy.planning import resolve
from fedtailor.receipts import Leaf, receipts

PLAN = resolve(load(["study=heart", "sites=[a,b]", "quorum=2", "rounds=3"]).plan)
POLICY = Policy(studies=("heart",), epsilon=8.0, delta=1e-4)
HUB = Hub("a", "b")
LEAVES = [Leaf("a", "1" * 64, "2" * 64), Leaf("b", "3" * 64, "4" * 64)]


@pytest.fixture
def site(tmp_path):
    """Site a, which answered round 0 with 1…1."""
    book, ledger = HUB.plans(tmp_path / "plans", "a"), Ledger(tmp_path / "ledger.db")
    known = book.take(HUB.visit(HUB.propose(PLAN)))
    known.note_answer(0, "1" * 64)
    yield book, known, ledger
    ledger.close()


def shown(site, receipt, seal=None):
    book, known, ledger = site
    seal = seals.sign(HUB.key, "receipt", receipt.text()) if seal is None else seal
    visit = HUB.visit(known.proposal, round=1, receipt=receipt, receipt_seal=seal)
    warrants.check(visit, known, POLICY, book.signer, book.own, ledger)


def given(site, leaves=LEAVES, name="a", **changed):
    known = site[1]
    return receipts("r", known.digest, 0, leaves, {})[name].model_copy(update=changed)


def test_a_receipt_for_what_was_answered_is_kept(site):
    shown(site, given(site))
    assert [path.name for path in (site[1].folder / "receipts").iterdir()] == ["000000.json"]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda site: (given(site, name="b"), None),
        lambda site: (given(site, [LEAVES[0]._replace(summand_sha256="5" * 64), LEAVES[1]]), None),
        lambda site: (given(site, run="other"), None),
        lambda site: (given(site, proposal="0" * 64), None),
        lambda site: (given(site, root="0" * 64), None),
        lambda site: (given(site, round=2), None),
        lambda site: (given(site), ""),
        lambda site: (given(site), seals.sign(HUB.key, "visit", given(site).text())),
    ],
    ids=["another site's", "another answer", "run", "proposal", "root", "round", "unsigned", "for another purpose"],
)
def test_any_other_receipt_is_refused_and_not_kept(site, wrong):
    with pytest.raises(RefusedError) as error:
        shown(site, *wrong(site))
    assert error.value.code == "receipt" and not (site[1].folder / "receipts").exists()


# --- sites that take turns ---

TURNS = resolve(load(["study=heart", "sites=[a,b,c]", "quorum=1", "rounds=4", "privacy=site",
                      "privacy.correlated={separation: 2}"]).plan)  # fmt: skip
OTHERS = Hub("a", "b", "c")
SAME, OTHER = hashlib.sha256(b"cast").hexdigest(), "9" * 64


def turned(tmp_path, name, round, *, seen=None, before=SAME, witnessed=None):
    """What becomes of a visit to a site that was cast ``seen``: None, or the code of the refusal."""
    book, ledger = OTHERS.plans(tmp_path / "plans", name), Ledger(tmp_path / "ledger.db")
    of = OTHERS.propose(TURNS)
    known = book.take(OTHERS.visit(of))
    for earlier, digest in (seen or {}).items():
        known.note_cast(earlier, digest)
    signed = {} if witnessed is None else OTHERS.witnesses(of, witnessed, before)
    visit = OTHERS.visit(of, round=round, train=round < 4, before=before, witnesses=signed)
    try:
        warrants.check(visit, known, POLICY, book.signer, book.own, ledger)
    except RefusedError as error:
        return error.code
    finally:
        ledger.close()
    return None


@pytest.mark.parametrize(
    ("code", "name", "round", "shown"),
    [
        (None, "a", 2, {"seen": {0: SAME}, "witnessed": 0}),
        ("split", "a", 2, {"seen": {0: OTHER}, "witnessed": 0}),  # the others were cast another model than this site
        ("split", "a", 2, {"seen": {0: SAME}, "witnessed": 1}),  # of a round in which it was not asked
        ("split", "a", 2, {"seen": {0: SAME}, "before": None}),
        ("cohort", "a", 2, {"seen": {0: SAME}}),
        (None, "b", 1, {"before": None}),  # its first turn
        (None, "b", 4, {"seen": {1: SAME, 3: SAME}, "witnessed": 3}),  # the last visit, to all
        (None, "a", 4, {"seen": {0: SAME, 2: SAME}, "witnessed": 2}),
        ("split", "a", 4, {"seen": {0: SAME, 2: OTHER}, "witnessed": 2}),
    ],
)
def test_a_site_compares_with_what_it_was_cast_in_its_turn_before(tmp_path, code, name, round, shown):
    assert turned(tmp_path, name, round, **shown) == code


def test_the_turn_before_is_the_last_round_that_asked_the_site():
    plain = TURNS.model_copy(update={"privacy": None})
    for plan in (TURNS, plain):
        for site in plan.sites:
            for round in range(6):
                earlier = [one for one in range(round) if site in plan.asked(one)]
                assert plan.previous(site, round) == (earlier[-1] if earlier else None)
    assert [plain.previous("b", round) for round in range(3)] == [None, 0, 1]
