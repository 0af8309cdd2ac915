"""A coordinator that asks for more than the plan says: refused before the data are touched, or before they are used."""

import hashlib

import pytest

from fedtailor.client.fleet import Envelope
from fedtailor.client.inbox import Entry
from fedtailor.client.ledger import Ledger
from fedtailor.client.site import Home, SiteConfig
from fedtailor.client.visits import Visits
from fedtailor.config import load
from fedtailor.errors import RefusedError
from fedtailor.policy import Hours
from fedtailor.privacy.planning import resolve
from fedtailor.wire import Visit

PLAN = resolve(load(["study=heart", "sites=[a,b]", "quorum=1", "rounds=3"]).plan)
CONFIG = SiteConfig.model_validate(
    {"site": "a", "server": "hub:1", "data": {"name": "heart", "path": "x.csv"},
     "policy": {"studies": ["heart"], "epsilon": 1000.0, "delta": 1e-4}}
)  # fmt: skip


class Told(Exception):
    """The training process was asked to train."""


class FakeWorkshop:
    def __init__(self):
        self.asked = []

    def ask(self, *, op, **request):
        self.asked.append(op)
        if op == "visit":
            raise Told
        return {"fingerprint": "f0", "rows": 50, "train_rows": 30, "test_rows": 20, "notes": []}


@pytest.fixture
def site(tmp_path):
    home = Home(tmp_path / "site")
    home.make()
    ledger = Ledger(home.state / "ledger.db")
    yield Visits(CONFIG, home, ledger, FakeWorkshop(), {})
    ledger.close()


def ask(site, tmp_path, *, cast=b"cast", plan=PLAN, **changed):
    folder = tmp_path / "entry"
    folder.mkdir(exist_ok=True)
    (folder / "payload.safetensors").write_bytes(cast)
    fields = {"run": "r", "round": 0, "train": True, "evaluate": False, "baseline": False, "plan": plan.canonical(),
              "cast_sha256": hashlib.sha256(cast).hexdigest()}  # fmt: skip
    site.perform(Entry(folder, Envelope(1, "m", 0.0, 60.0, 0.0)), Visit(**fields | changed))


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
        ("plan", {"plan": PLAN.model_copy(update={"rounds": -1})}),
        ("roster", {"plan": PLAN.model_copy(update={"sites": ("b", "c")})}),
        ("upload", {"plan": PLAN.model_copy(update={"recipe": load(["recipe=heart_mlp", "recipe.hidden=2000000000"]).plan.recipe})}),
    ],
)  # fmt: skip
def test_what_is_not_in_the_plan_or_the_policy_touches_no_data(site, tmp_path, code, asked):
    assert refused(site, tmp_path, **asked) == code
    assert site.workshop.asked == [] and site.ledger.statement() == []


def test_a_round_that_is_asked_with_one_model_after_another_cannot_pass_the_plans_promise(site, tmp_path):
    """Each answer to another model is another release; the site's own cap of 1000 would allow them all."""
    for i in range(3):
        with pytest.raises(Told):
            ask(site, tmp_path, cast=b"model %d" % i)
    assert refused(site, tmp_path, cast=b"one more") == "promise"
    assert len(site.ledger.statement()) == 3


def test_outside_its_hours_a_site_does_not_work(site, tmp_path):
    never = CONFIG.policy.model_copy(update={"hours": Hours(begin="12:00", end="12:00")})
    site.config = CONFIG.model_copy(update={"policy": never})
    assert refused(site, tmp_path) == "hours" and site.workshop.asked == []
