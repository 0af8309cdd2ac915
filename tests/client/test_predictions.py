"""What a rehearsal and a simulation predict of a plan is what the daemon then decides, charges and sends."""

import hashlib
import random
from pathlib import Path

import pytest
import torch
from hub import Hub
from safetensors.torch import save

from fedtailor.client.fleet import Envelope
from fedtailor.client.inbox import Entry
from fedtailor.client.ledger import Ledger
from fedtailor.client.site import Home, SiteConfig
from fedtailor.client.visits import Visits
from fedtailor.config import load
from fedtailor.errors import RefusedError
from fedtailor.policy import Policy
from fedtailor.privacy.planning import resolve
from fedtailor.simulations import policies
from fedtailor.study import Plan
from fedtailor.wire import Report

HUB = Hub("a", "b", "c")
BASE = load(["study=heart", "sites=[a,b,c]", "quorum=2", "rounds=2"]).plan

POLICIES = {
    "generous": Policy(studies=("heart",), epsilon=1e6, delta=1e-3, without_privacy=True, approval="policy"),
    "private": Policy(studies=("heart",), epsilon=4.0, delta=1e-4, least_noise=0.7, approval="policy"),
    "strict": Policy(studies=("heart",), epsilon=2.0, delta=1e-5, greatest_clip=1.0, minimum_cohort=3, max_rounds=3,
                     max_steps=5, approval="policy"),
    "particular": Policy(studies=("heart", "lungs"), epsilon=8.0, delta=1e-4, recipes=("tabular",), strategies=("fedavg",),
                         partners=("b", "c"), epsilon_per_study=3.0, approval="policy"),
    "noised": Policy(studies=("heart",), epsilon=6.0, delta=1e-3, metric_noise=30.0, approval="policy"),
    "another": Policy(studies=("lungs",), epsilon=8.0, delta=1e-4, greatest_norm=500.0, max_upload_mb=1, approval="policy"),
}  # fmt: skip


def generated(seed: int) -> Plan:
    """A plan somewhere around what the policies allow."""
    rng = random.Random(seed)
    rounds, steps, rate = rng.choice([1, 2, 4]), rng.choice([1, 4, 6]), rng.choice([0.05, 0.2])
    privacy = None
    if rng.random() < 0.85:
        privacy = BASE.privacy.model_copy(update={
            "epsilon": rng.choice([0.5, 1.5, 3.0, 9.0, 1000.0]), "delta": rng.choice([1e-5, 1e-4, 1e-2]),
            "clip": rng.choice([0.5, 1.0, 50.0]), "noise_multiplier": rng.choice([0.05, 0.6, 0.8, 1.1, 2.5])})  # fmt: skip
    strategy = load([f"strategy={rng.choice(['fedavg', 'fedavg', 'scaffold', 'median'])}"]).plan.strategy
    hidden = rng.choice([4, 16, 20_000])
    recipe = rng.choice([BASE.recipe, load(["recipe=heart_mlp", f"recipe.hidden={hidden}"]).plan.recipe])
    return BASE.model_copy(update={
        "study": rng.choice(["heart", "heart", "heart", "lungs"]), "rounds": rounds, "privacy": privacy, "recipe": recipe,
        "strategy": strategy, "quorum": rng.choice([1, 2, 3]), "norm": rng.choice([None, 100.0, 1000.0]),
        "local": BASE.local.model_copy(update={"steps": steps, "rate": rate})})  # fmt: skip


PLANS = [generated(seed) for seed in range(50)]


class Trainer:
    """A training process that answers honestly, with tensors of zeros."""

    def __init__(self, site):
        self.site = site

    def ask(self, *, op, **request):
        if op == "describe":
            return {"fingerprint": "f0", "rows": 50, "train_rows": 30, "test_rows": 20, "notes": []}
        out, (known,) = Path(request["out"]), self.site.plans.all()
        out.mkdir(parents=True, exist_ok=True)
        spec = known.proposal.leaves.spec() if self.round is not None else {}
        payload = save({name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in spec.items()})
        report = Report(run="r", round=self.of, rows=50, train_rows=30, metrics={"auroc": 0.5},
                        summand_sha256=hashlib.sha256(payload).hexdigest(), salt="0" * 64)  # fmt: skip
        (out / "work.json").write_text(report.model_dump_json())
        (out / "summand.safetensors").write_bytes(payload)
        return {}


def real(tmp_path, policy: Policy, plan: Plan) -> tuple[str | None, float | None]:
    """What a site's daemon does with every round of a plan: the code by which it refuses, and the ε of its ledger."""
    config = SiteConfig.model_validate({"site": "a", "server": "hub:1", "data": {"name": "heart", "path": "x.csv"},
                                        "policy": policy.model_dump()})  # fmt: skip
    home = Home(tmp_path / "site")
    home.make()
    ledger = Ledger(home.state / "ledger.db")
    site = Visits(config, home, HUB.plans(home.state / "plans", "a"), HUB.keys["a"], ledger, None, {})
    site.workshop = trainer = Trainer(site)
    of, folder, spent = HUB.propose(plan), tmp_path / "entry", None
    folder.mkdir()
    (folder / "payload.safetensors").write_bytes(b"cast")
    try:
        for round in range(plan.rounds + 1):
            last = round == plan.rounds
            trainer.of, trainer.round = round, None if last else round
            asked = {"round": round, "train": not last, "evaluate": True}
            answer = site.answer(Entry(folder, Envelope(1, "m", 0.0, 60.0, 0.0)), HUB.visit(of, **asked))
            spent = answer.report.epsilon
        return None, spent
    except RefusedError as error:
        return error.code, None
    finally:
        metrics = [entry for entry in ledger.statement() if entry.study == "r/metrics"]
        assert all(entry.settled_digest for entry in metrics)
        assert len(metrics) == (trainer.of + 1 if policy.metric_noise and spent else 0)
        ledger.close()


@pytest.mark.parametrize("name,code", [("generous", None), ("private", "privacy"), ("noised", "privacy")])
def test_a_promise_that_the_coordinator_makes_is_no_record_level_privacy(tmp_path, name, code):
    """A policy that asks for record-level privacy refuses it; one that asks for none charges nothing for it."""
    site = {"unit": "site", "epsilon": 3.0, "delta": 1e-5, "clip": 0.5}
    plan = resolve(Plan.model_validate(BASE.model_dump(by_alias=True) | {"privacy": site}))
    assert real(tmp_path, POLICIES[name], plan) == (code, None)
    rules = policies.judge(plan, {"a": POLICIES[name]})["a"]
    assert next((rule.code for rule in rules if not rule.ok), None) == code
    ledger = Ledger(tmp_path / "site" / "state" / "ledger.db")
    assert ledger.statement() == []
    ledger.close()


def test_a_site_is_not_asked_out_of_turn(tmp_path):
    site = {"unit": "site", "epsilon": 3.0, "delta": 1e-5, "clip": 0.5, "correlated": {"separation": 3}}
    plan = resolve(Plan.model_validate(BASE.model_dump(by_alias=True) | {"privacy": site, "quorum": 1}))
    assert [plan.asked(round) for round in range(4)] == [("a",), ("b",), ("c",), ("a",)]
    assert real(tmp_path, POLICIES["generous"], plan) == ("rounds", None)


OFTEN = ("private", "particular")


@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in POLICIES])
def test_predicted_and_real_decisions_agree_for_fifty_plans(tmp_path, name):
    policy, seen = POLICIES[name], set()
    for number, plan in enumerate(PLANS):
        folder = tmp_path / str(number)
        folder.mkdir()
        code, spent = real(folder, policy, plan)
        rules = policies.judge(plan, {"a": policy})["a"]
        predicted = next((rule.code for rule in rules if not rule.ok), None)
        assert predicted == code, (number, plan)
        if code is None and plan.privacy is not None:
            stated = next(float(rule.asked) for rule in rules if rule.code == "epsilon")
            assert spent == pytest.approx(stated, rel=0.01)
        seen.add(code)
    assert len(seen) > 2, seen  # the corpus tries more than one rule
