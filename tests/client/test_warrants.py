"""Receipts: for this site's own answer, signed by the coordinator, and kept; anything else is refused."""

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
