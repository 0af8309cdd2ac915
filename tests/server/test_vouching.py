"""What the coordinator shows its sites: each site verifies it with the key that it pinned."""

import hashlib
import json

import pytest
from hub import Hub

from fedtailor import proposal, seals
from fedtailor.config import load
from fedtailor.errors import WireError
from fedtailor.privacy.planning import resolve
from fedtailor.receipts import Head
from fedtailor.server.vouching import Heads, Last, Vouch, last_of, lasts_from
from fedtailor.wire import Report, Visit, witnessed

PLAN = resolve(load(["study=heart", "sites=[a,b,c]", "quorum=2", "rounds=3"]).plan)
TURNS = resolve(load(["study=heart", "sites=[a,b,c]", "quorum=1", "rounds=3", "privacy=site",
                      "privacy.correlated={separation: 2}"]).plan)  # fmt: skip
HUB = Hub("a", "b", "c")
OF = HUB.propose(PLAN)
CAST = hashlib.sha256(b"cast").hexdigest()


def visit(round=1, **changed):
    fields = {"run": "r", "round": round, "train": True, "evaluate": False, "baseline": False, "plan": PLAN.canonical(),
              "cast_sha256": CAST}  # fmt: skip
    return Visit(**fields | changed)


def report(site, round=1, **changed):
    head = Head(count=3, hash="0" * 64, signature="")
    head = head.model_copy(update={"signature": seals.sign(HUB.keys[site], "ledger-head", head.text())})
    fields = {"run": "r", "round": round, "rows": 9, "train_rows": 6, "summand_sha256": "1" * 64, "salt": "2" * 64,
              "witness": seals.sign(HUB.keys[site], "witness", witnessed("r", round, CAST)), "head": head}  # fmt: skip
    return Report(**fields | changed)


@pytest.fixture
def vouch(tmp_path):
    return Vouch(proposal.signed(OF, HUB.key), OF, HUB.key, Heads(tmp_path / "heads"))


def test_every_site_is_shown_the_same_but_for_its_own_receipt_and_head(vouch):
    last = last_of(visit(0), {"a": report("a", 0), "c": report("c", 0)})
    head = report("a").head
    vouch.heads.note("a", head, None)
    shown = vouch.visits(visit(), [last])
    own = {"receipt", "receipt_seal", "head"}
    assert shown.keys() == {"a", "b", "c"} and len({v.model_dump_json(exclude=own) for v in shown.values()}) == 1
    one, signer = shown["a"], HUB.key.public_key()
    assert proposal.opened(one.proposal, signer) == OF and seals.genuine(signer, "visit", one.sealed(), one.seal)
    assert one.before == CAST and one.witnesses.keys() == {"a", "c"} and one.head == head
    receipt = one.receipt
    assert receipt.holds() and receipt.head == one.head and receipt.count == 2 and receipt.root == last.root()
    assert seals.genuine(signer, "receipt", receipt.text(), one.receipt_seal)
    assert shown["b"].receipt is None and shown["c"].receipt.site == "c"


def test_where_sites_take_turns_each_is_shown_the_round_of_its_own(tmp_path):
    """a and c are asked in rounds 0 and 2, b in round 1; in the end all are."""
    of = HUB.propose(TURNS)
    vouch = Vouch(proposal.signed(of, HUB.key), of, HUB.key, Heads(tmp_path / "heads"))
    lasts = [
        last_of(visit(0, cast_sha256="0" * 64), {"a": report("a", 0), "c": report("c", 0)}),
        last_of(visit(1, cast_sha256="1" * 64), {"b": report("b", 1)}),
        last_of(visit(2, cast_sha256="2" * 64), {"a": report("a", 2), "c": report("c", 2)}),
    ]
    first = vouch.visits(visit(1), lasts[:1])
    assert first["b"].before is None and first["b"].witnesses == {}  # its first turn
    for shown, before in [(vouch.visits(visit(2), lasts[:2]), (0, 1)), (vouch.visits(visit(3), lasts[1:]), (2, 1))]:
        for site, round in (("a", before[0]), ("b", before[1]), ("c", before[0])):
            one = shown[site]
            assert one.before == str(round) * 64 and one.witnesses == lasts[round % 3].witnesses
            assert (one.receipt.site, one.receipt.round) == (site, round) and one.receipt.holds()


def test_the_first_round_has_nothing_before_it(vouch):
    one = vouch.visits(visit(0), [])["a"]
    assert one.before is None and one.witnesses == {} and one.receipt is None


@pytest.mark.parametrize(
    ("code", "changed"),
    [
        ("witness", {"witness": None}),
        ("witness", {"witness": seals.sign(HUB.keys["a"], "witness", witnessed("r", 0, CAST))}),
        ("witness", {"witness": seals.sign(HUB.keys["b"], "witness", witnessed("r", 1, CAST))}),
        ("head", {"head": Head(count=9, hash="0" * 64, signature="00")}),
        ("head", {"head": report("b").head}),
    ],
)
def test_an_answer_without_its_sites_signatures_does_not_count(vouch, code, changed):
    vouch.check("a", report("a"), visit())
    with pytest.raises(WireError) as error:
        vouch.check("a", report("a", **changed), visit())
    assert error.value.code == code
    assert vouch.heads.get("a").count == 3


def test_agreement_alone_needs_no_witness(vouch):
    asks = visit(0, train=False)
    vouch.check("a", report("a", 0, witness=None), asks)


def test_a_head_never_goes_back(tmp_path):
    heads = Heads(tmp_path)
    assert heads.get("a") is None
    for count in (5, 3, 4):
        heads.note("a", Head(count=count, hash="0" * 64, signature="00"), heads.get("a"))
    assert Heads(tmp_path).get("a").count == 5
    (tmp_path / "a.json").write_text("{")
    assert heads.get("a") is None


def test_a_site_that_joined_anew_is_not_shown_a_head_of_its_former_key(vouch):
    """It would refuse it for ever: its key did not sign it."""
    strange = report("b").head.model_copy(update={"count": 99})
    vouch.heads.note("a", strange, None)
    assert vouch.visits(visit(), [])["a"].head is None
    vouch.check("a", report("a"), visit())
    assert vouch.visits(visit(), [])["a"].head.count == 3


def test_what_is_kept_of_a_round_survives_a_checkpoint():
    last = last_of(visit(1), {"b": report("b"), "a": report("a")})
    assert lasts_from(json.loads(json.dumps([last, last]))) == (last, last) and lasts_from(None) == ()
    assert lasts_from(json.loads(json.dumps(last))) == (last,)  # as an older checkpoint holds it
    assert [leaf[0] for leaf in last.leaves] == ["a", "b"] and len(last.root()) == 64
    assert Last(0, CAST).root() == ""
