"""A coordinator that asks for more than the plan says: refused before the data are touched, or before they are used."""

import hashlib

import pytest
import torch
from hub import Hub
from safetensors.torch import save

from fedtailor.client import inbox
from fedtailor.client.fleet import Envelope
from fedtailor.client.inbox import Entry
from fedtailor.client.ledger import Ledger
from fedtailor.client.site import Home, SiteConfig
from fedtailor.client.visits import Held, Visits
from fedtailor.config import load
from fedtailor.errors import RefusedError
from fedtailor.policy import Hours
from fedtailor.privacy.planning import resolve
from fedtailor.receipts import Head
from fedtailor.wire import Report

PLAN = resolve(load(["study=heart", "sites=[a,b]", "quorum=2", "rounds=3"]).plan)
CONFIG = SiteConfig.model_validate(
    {"site": "a", "server": "hub:1", "data": {"name": "heart", "path": "x.csv"},
     "policy": {"studies": ["heart"], "epsilon": 1000.0, "delta": 1e-4, "approval": "policy"}}
)  # fmt: skip
HUB = Hub("a", "b", "c")


class Told(Exception):
    """The training process was asked to train."""


class FakeWorkshop:
    """Says that it was asked to train, or leaves ``answer`` in the folder it was given."""

    def __init__(self):
        self.asked, self.answer = [], None

    def ask(self, *, op, **request):
        self.asked.append(op)
        if op == "describe":
            return {"fingerprint": "f0", "rows": 50, "train_rows": 30, "test_rows": 20, "notes": []}
        if self.answer is None:
            raise Told
        self.answer(request)
        return {}


@pytest.fixture
def site(tmp_path):
    home = Home(tmp_path / "site")
    home.make()
    ledger = Ledger(home.state / "ledger.db")
    yield Visits(CONFIG, home, HUB.plans(home.state / "plans", "a"), HUB.keys["a"], ledger, FakeWorkshop(), {})
    ledger.close()


def ask(site, tmp_path, *, cast=b"cast", plan=PLAN, run="r", **changed):
    folder = tmp_path / "entry"
    folder.mkdir(exist_ok=True)
    (folder / "payload.safetensors").write_bytes(cast)
    known = site.plans.folder / run / "proposal.json"
    of = changed.pop("of", None) or (HUB.propose(plan, run) if not known.exists() else site.plans.find(run).proposal)
    return site.answer(Entry(folder, Envelope(1, "m", 0.0, 60.0, 0.0)), HUB.visit(of, cast=cast, **changed))


def refused(site, tmp_path, **asked):
    with pytest.raises(RefusedError) as error:
        ask(site, tmp_path, **asked)
    return error.value.code


def test_an_honest_round_is_charged_and_trained(site, tmp_path):
    for round in range(3):
        with pytest.raises(Told):
            ask(site, tmp_path, round=round)
    assert len(site.ledger.statement()) == 3 and site.workshop.asked == ["describe", "visit"] * 3


@pytest.mark.parametrize(
    ("code", "asked"),
    [
        ("rounds", {"round": 3}),
        ("rounds", {"round": 10**9}),
        ("cast", {"cast_sha256": "0" * 64}),
        ("plan", {"of": HUB.propose(PLAN).model_copy(update={"plan": PLAN.model_copy(update={"rounds": -1})})}),
        ("roster", {"plan": PLAN.model_copy(update={"sites": ("b", "c")})}),
        ("upload", {"plan": PLAN.model_copy(update={"recipe": load(["recipe=heart_mlp", "recipe.hidden=2000000000"]).plan.recipe})}),
    ],
)  # fmt: skip
def test_what_is_not_in_the_plan_or_the_policy_touches_no_data(site, tmp_path, code, asked):
    assert refused(site, tmp_path, **asked) == code
    assert site.workshop.asked == [] and site.ledger.statement() == []


def test_a_round_is_trained_from_one_model_only(site, tmp_path):
    """Each answer to another model is another release. The plan's promise alone would allow three of them."""
    with pytest.raises(Told):
        ask(site, tmp_path)
    for i in range(3):
        assert refused(site, tmp_path, cast=b"model %d" % i) == "replayed"
    assert len(site.ledger.statement()) == 1


def test_a_lost_note_of_what_was_cast_does_not_lift_the_plans_promise(site, tmp_path):
    """The second line behind the first: the ledger counts by itself."""
    for i in range(3):
        with pytest.raises(Told):
            ask(site, tmp_path, cast=b"model %d" % i)
        (site.plans.folder / "r" / "casts.json").unlink()
    assert refused(site, tmp_path, cast=b"one more") == "promise"
    assert len(site.ledger.statement()) == 3


def test_outside_its_hours_a_site_does_not_work(site, tmp_path):
    never = CONFIG.policy.model_copy(update={"hours": Hours(begin="12:00", end="12:00")})
    site.config = CONFIG.model_copy(update={"policy": never})
    assert refused(site, tmp_path) == "hours" and site.workshop.asked == []


# --- people decide ---


def with_policy(site, **changed):
    site.config = CONFIG.model_copy(update={"policy": CONFIG.policy.model_copy(update=changed)})


def test_nothing_runs_before_a_person_has_approved(site, tmp_path):
    with_policy(site, approval="person")
    assert refused(site, tmp_path) == "pending" and site.workshop.asked == []
    site.plans.decide(site.plans.find("r"), "approved", "ann")
    with pytest.raises(Told):
        ask(site, tmp_path)
    site.plans.decide(site.plans.find("r"), "refused", "ann")
    assert refused(site, tmp_path, round=1) == "refused"
    assert len(site.ledger.statement()) == 1


def test_a_plan_that_the_policy_refuses_is_refused_before_anybody_is_asked(site, tmp_path):
    with_policy(site, approval="person", epsilon=0.1)
    assert refused(site, tmp_path) == "budget"


def test_a_proposal_alone_touches_the_data_only_once_it_is_approved_and_charges_nothing(site, tmp_path):
    with_policy(site, approval="person")
    assert refused(site, tmp_path, train=False) == "pending" and site.workshop.asked == []
    site.plans.decide(site.plans.find("r"), "approved", "ann")
    stored = ask(site, tmp_path, train=False)
    assert site.workshop.asked == ["describe"] and site.ledger.statement() == []
    assert (stored.report.rows, stored.report.metrics, stored.report.witness) == (0, None, None)


def trained(site, flat=None, **said):
    """A training process that answers with the agreed tensors, or ``flat``."""

    def answer(request):
        from pathlib import Path

        out = Path(request["out"])
        out.mkdir(parents=True, exist_ok=True)
        leaves = site.plans.find("r").proposal.leaves
        honest = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in leaves.spec().items()}
        payload = save(honest if flat is None else flat)
        report = Report(run="r", round=said.pop("round", 0), rows=50, train_rows=30, salt="0" * 64,
                        summand_sha256=hashlib.sha256(payload).hexdigest(), **said)  # fmt: skip
        (out / "work.json").write_text(report.model_dump_json())
        (out / "summand.safetensors").write_bytes(payload)

    site.workshop.answer = answer


def test_what_the_airlock_drops_stops_the_study_here(site, tmp_path):
    trained(site, {"delta/more": torch.ones(3)})
    assert refused(site, tmp_path) == "airlock-keys"
    trained(site)
    assert refused(site, tmp_path) == "stopped" and list(site.home.outbox.iterdir()) == []
    site.plans.decide(site.plans.find("r"), "approved", "ann")
    assert ask(site, tmp_path).report.rows == 50


def test_an_answer_that_is_held_leaves_when_a_person_lets_it(site, tmp_path):
    with_policy(site, hold="each")
    trained(site)
    for _ in range(2):
        with pytest.raises(Held):
            ask(site, tmp_path)
    (row,) = inbox.held(site.home.outbox)
    assert (row["run"], row["round"]) == ("r", 0)
    inbox.release(site.home.outbox, row["answer"])
    assert ask(site, tmp_path).report.run == "r" and inbox.held(site.home.outbox) == []
    assert site.workshop.asked.count("visit") == 1


@pytest.mark.parametrize("round,held", [(0, False), (2, True)])
def test_only_the_last_answer_can_be_held(site, tmp_path, round, held):
    with_policy(site, hold="last")
    trained(site, round=round)
    if held:
        with pytest.raises(Held):
            ask(site, tmp_path, round=round)
    else:
        ask(site, tmp_path, round=round)


def test_an_answer_in_the_outbox_does_not_leave_once_the_study_is_refused(site, tmp_path):
    trained(site)
    ask(site, tmp_path)
    site.plans.decide(site.plans.find("r"), "refused", "ann")
    assert refused(site, tmp_path) == "refused"


def test_an_answer_witnesses_what_was_cast_and_shows_the_ledger(site, tmp_path):
    trained(site)
    report = ask(site, tmp_path).report
    digest = hashlib.sha256(b"cast").hexdigest()
    assert {"a": report.witness}.keys() == {"a"} and report.head.count == 1
    from fedtailor import seals
    from fedtailor.wire import witnessed

    own = HUB.keys["a"].public_key()
    assert seals.genuine(own, "witness", witnessed("r", 0, digest), report.witness)
    assert seals.genuine(own, "ledger-head", report.head.text(), report.head.signature)


# --- what a coordinator must show ---


def signed_head(key, count, hash):
    from fedtailor import seals

    head = Head(count=count, hash=hash, signature="")
    return head.model_copy(update={"signature": seals.sign(key, "ledger-head", head.text())})


OTHER = hashlib.sha256(b"another").hexdigest()


def split(of):
    """Witnesses of b's that it was shown another model."""
    return HUB.witnesses(of, 0, hashlib.sha256(b"cast").hexdigest()) | {"b": HUB.witnesses(of, 0, OTHER)["b"]}


MOVES = {
    "no seal": ("seal", lambda of: {"seal": ""}),
    "a seal for another round": ("seal", lambda of: {"seal": HUB.visit(of, round=2).seal}),
    "a stranger's seal": ("seal", lambda of: {"seal": Hub("a", "b").visit(of, round=1).seal}),
    "another model for the others, told": ("split", lambda of: {"before": OTHER, "witnesses": HUB.witnesses(of, 0, OTHER)}),
    "another model for the others, hidden": ("split", lambda of: {"witnesses": split(of)}),
    "nothing about the round before": ("split", lambda of: {"before": None, "witnesses": {}}),
    "a site alone": ("cohort", lambda of: {"witnesses": dict(list(HUB.witnesses(of, 0, hashlib.sha256(b"cast").hexdigest()).items())[:1])}),
    "nobody": ("cohort", lambda of: {"witnesses": {}}),
    "a stranger's witness": ("split", lambda of: {"witnesses": {"mallory": "00"}}),
    "a witness of another round": ("split", lambda of: {"witnesses": HUB.witnesses(of, 1, hashlib.sha256(b"cast").hexdigest())}),
    "a ledger head that this site never signed": ("ledger-head", lambda of: {"head": signed_head(HUB.keys["b"], 1, "0" * 64)}),
    "a ledger head that is not in the ledger": ("rolled-back", lambda of: {"head": signed_head(HUB.keys["a"], 9, "0" * 64)}),
}  # fmt: skip


@pytest.mark.parametrize("move", MOVES)
def test_a_coordinator_that_cheats_on_what_it_must_show_is_refused(site, tmp_path, move):
    with pytest.raises(Told):
        ask(site, tmp_path)
    code, make = MOVES[move]
    asked = site.workshop.asked.copy()
    assert refused(site, tmp_path, round=1, **make(site.plans.find("r").proposal)) == code
    assert site.workshop.asked == asked and len(site.ledger.statement()) == 1
    with pytest.raises(Told):  # and an honest one goes on
        ask(site, tmp_path, round=1)


def test_a_ledger_that_was_put_back_is_noticed(site, tmp_path):
    """Yesterday's file: valid in itself, and with budget that was spent since."""
    with pytest.raises(Told):
        ask(site, tmp_path)
    head = site.head()
    site.ledger.close()
    for path in site.home.state.glob("ledger.db*"):
        path.unlink()
    site.ledger = Ledger(site.home.state / "ledger.db")
    assert refused(site, tmp_path, round=1, head=head) == "rolled-back"


def test_rounds_do_not_go_back(site, tmp_path):
    for round in range(2):
        with pytest.raises(Told):
            ask(site, tmp_path, round=round)
    assert refused(site, tmp_path, round=0) == "replayed"


def test_a_cohort_must_be_what_the_policy_says_not_only_the_plan(site, tmp_path):
    plan = PLAN.model_copy(update={"quorum": 1})
    with pytest.raises(Told):
        ask(site, tmp_path, plan=plan)
    one = dict(list(HUB.witnesses(site.plans.find("r").proposal, 0, hashlib.sha256(b"cast").hexdigest()).items())[:1])
    with pytest.raises(Told):
        ask(site, tmp_path, round=1, witnesses=one)
    with_policy(site, minimum_cohort=2)
    assert refused(site, tmp_path, round=1, witnesses=one) == "cohort"
