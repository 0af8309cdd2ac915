"""``kill -9`` of everything there is, in mid-round and in mid-upload: nothing counts twice and no epsilon is lost."""

import json
import os
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fedtailor.client.audit import gather
from fedtailor.client.site import Home
from fedtailor.client.verify_audit import examine
from fedtailor.datasets import heart_disease
from fedtailor.privacy.accounting import Charge, epsilon
from fedtailor.simulations.run import simulate
from fedtailor.tree import norm

pytestmark = pytest.mark.deployment
SLOW = ("rounds=4", "local.steps=150", "local.lr=0.02")  # a round takes a second or two: there is a middle to hit


def trained(outbox: Path) -> set[str]:
    """The answers that hold tensors."""
    found = set()
    for path in outbox.glob("[!.]*/visit.json"):
        if "tensors" in json.loads(path.read_text())["listed"]:
            found.add(path.parent.name)
    return found


def in_round(deployment, run, round):
    deployment.until(lambda: deployment.status(run)["round"] >= round, 60, f"round {round} of {run}")


def runs_like_the_simulator(deployment, run, plan):
    simulated, params = simulate(plan, heart_disease())
    deployed = load_file(deployment.run_folder(run) / "model.safetensors")
    difference = norm({name: deployed[name] - params[name] for name in params})
    assert difference < 1e-5 * max(1.0, norm(params)), "a round was lost, or counted twice"


def every_round_was_charged_once(deployment, run, plan, result):
    charge = Charge(plan.privacy.noise_multiplier, plan.local.rate, plan.local.steps)
    for site in deployment.sites:
        rows = [row for row in deployment.ask_site(site, "Ledger")["rows"] if row["run"] == run]
        assert len(rows) == plan.rounds, rows
        home = Home(deployment.site_home(site))
        assert examine(gather(home, home.config()))[0] == []  # and whatever the crash tore is accounted for
        assert result["sites"][site]["epsilon"] == pytest.approx(epsilon([charge] * plan.rounds, plan.privacy.delta))


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


def kill_9(deployment, victim):
    """Kill one of them; the coordinator or a whole site is started again, and a site's daemon starts a worker by itself."""
    if victim == "worker":
        os.kill(deployment.ask_site("va", "Status")["worker_pid"], signal.SIGKILL)
    else:
        deployment.kill(victim)
        deployment.start(victim)


@pytest.mark.parametrize(
    ("victim", "privacy"),
    [("server", "none"), slow("server", "record"), slow("worker", "none"), ("worker", "record"), slow("va", "none"),
     ("va", "record")],
)  # fmt: skip
def test_a_run_survives_kill_9_in_mid_round(deployment, victim, privacy):
    plan = deployment.plan(f"privacy={privacy}", *SLOW)
    run = deployment.submit(plan)
    in_round(deployment, run, 1)
    kill_9(deployment, victim)
    result = deployment.finish(run)
    assert result["rounds"] == plan.rounds and result["status"] == "completed"
    assert [h["round"] for h in result["history"]] == list(range(plan.rounds + 1))
    if privacy == "none":
        runs_like_the_simulator(deployment, run, plan)
    else:
        every_round_was_charged_once(deployment, run, plan, result)


@pytest.mark.parametrize("victim", ["va", "server", "worker"])
def test_a_run_survives_kill_9_in_mid_upload(deployment, victim):
    """The site's answer is durable and on its way: it must arrive once, and cost once."""
    plan = deployment.plan("privacy=record", "rounds=3")
    outbox: Path = deployment.site_home("va") / "state" / "outbox"
    before = trained(outbox)
    run = deployment.submit(plan)
    deployment.until(lambda: trained(outbox) - before, 60, "an answer", 0.001)
    kill_9(deployment, victim)
    result = deployment.finish(run)
    every_round_was_charged_once(deployment, run, plan, result)


@pytest.mark.parametrize("victim", ["va", pytest.param("server", marks=pytest.mark.slow)])
def test_a_run_survives_kill_9_with_half_an_answer_sent(deployment, victim):
    """A model of several chunks: some are at the coordinator, the others still at the site."""
    large = ("recipe=heart_mlp", "recipe.hidden=40000", "local.steps=1", "evaluation.baseline=false", "norm=null")
    plan = deployment.plan("privacy=none", "rounds=2", *large)
    outbox, transit = deployment.site_home("va") / "state" / "outbox", deployment.server_home / "transit"
    before = trained(outbox)
    run = deployment.submit(plan)
    deployment.until(lambda: trained(outbox) - before, 60, "an answer", 0.001)
    known = set(transit.iterdir())
    deployment.until(lambda: set(transit.iterdir()) - known, 60, "a chunk of it", 0.001)
    deployment.kill(victim)
    status = json.loads((deployment.run_folder(run) / "status.json").read_text())
    assert status["round"] == 0, "the round was open"
    deployment.start(victim)
    result = deployment.finish(run)
    assert result["rounds"] == 2 and not result["dropped"]
    runs_like_the_simulator(deployment, run, plan)
