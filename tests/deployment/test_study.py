"""A real study over a real deployment: what comes out, what it cost, and what a person can ask of both ends."""

import json
import shlex
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from fedtailor.client import verify_audit
from fedtailor.datasets import heart_disease
from fedtailor.privacy.accounting import Charge, epsilon
from fedtailor.result import Result
from fedtailor.simulations.run import simulate
from fedtailor.tree import norm

pytestmark = pytest.mark.deployment


def command(*arguments):
    done = subprocess.run([sys.executable, "-m", "fedtailor", *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "strategy",
    [
        "fedavg",
        "scaffold",
        "ditto recipe.model=mlp norm=null",
        pytest.param(
            "flower strategy.algorithm=FedAvgM 'strategy.arguments={server_momentum: 0.9}'", marks=pytest.mark.slow
        ),
        pytest.param("qfedavg", marks=pytest.mark.slow),
        pytest.param("quantise 'strategy.of={name: centred_clipping, radius: 2}'", marks=pytest.mark.slow),
    ],
)
def test_a_deployment_without_privacy_equals_the_simulation(deployment, strategy):
    """Also where sites keep a memory, report by their loss, or choose at random, where the server sees all replies, and
    where Flower's own code aggregates."""
    plan = deployment.plan("privacy=none", "rounds=3", *shlex.split(f"strategy={strategy}"))
    run = deployment.submit(plan)
    result = deployment.finish(run)
    simulated, params = simulate(plan, heart_disease())
    deployed = load_file(deployment.run_folder(run) / "model.safetensors")
    assert norm({name: deployed[name] - params[name] for name in params}) < 1e-5
    for site in deployment.sites:
        own = deployment.site_home(site) / "state" / "models" / f"{run}.safetensors"
        assert own.exists() == ("personal" in simulated.metrics)  # a model of its own stays at the site
        assert result["sites"][site]["metrics"].keys() == simulated.sites[site].metrics.keys()
        for kind in simulated.sites[site].metrics:
            assert result["sites"][site]["metrics"][kind] == pytest.approx(
                simulated.sites[site].metrics[kind],
                rel=1e-4,
                abs=1e-4,  # a site rounds to four digits
            )


@pytest.mark.slow
def test_sites_that_take_turns_have_receipts_of_all_their_rounds(deployment):
    """Each compares with, and is given a receipt of, the round of its own turn before."""
    run = deployment.submit(deployment.plan("privacy=site", "privacy.correlated={separation: 2, window: 2}", "quorum=1",
                                            "privacy.noise_multiplier=1.0", "rounds=4", "local.steps=2"))  # fmt: skip
    assert deployment.finish(run)["dropped"] == []
    for place, site in enumerate(deployment.sites):
        kept = deployment.site_home(site) / "state" / "plans" / run / "receipts"
        assert sorted(path.stem for path in kept.iterdir()) == [f"{place:06d}", f"{place + 2:06d}"]


@pytest.mark.slow
def test_a_slow_site_does_not_hold_up_the_others_and_counts_later(deployment):
    """Rounds close on one answer; a site that is stopped for a while answers an old round when it goes on."""
    slow = deployment.plan("privacy=none", "rounds=12", "quorum=1", "buffer={answers: 1, oldest: 12}",
                           "local.steps=60", "local.lr=0.02", "evaluation.baseline=false")  # fmt: skip
    run = deployment.submit(slow)
    result = deployment.finish(run)
    events = [json.loads(line) for line in (deployment.run_folder(run) / "events.jsonl").read_text().splitlines()]
    came = [(event["round"], event["site"]) for event in events if event["kind"] == "reply" and event["code"] is None]
    in_rounds = [site for round, site in came if round < slow.rounds]
    assert result["rounds"] == 12 and not result["dropped"] and set(in_rounds) == set(deployment.sites)
    assert len(in_rounds) < 12 * len(deployment.sites)  # nobody was waited for
    receipts = list(deployment.site_home("va").glob(f"state/plans/{run}/receipts/*"))
    assert receipts  # of answers that counted, late ones among them


def test_a_private_study_costs_what_it_says_and_its_folder_is_whole(deployment):
    plan = deployment.plan("rounds=3")
    run = deployment.submit(plan)
    result = Result.model_validate(deployment.finish(run))
    charge = Charge(plan.privacy.noise_multiplier, plan.local.rate, plan.local.steps)
    expected = epsilon([charge] * plan.rounds, plan.privacy.delta)
    assert expected <= plan.privacy.epsilon
    assert result.privacy.epsilon_max == pytest.approx(expected, abs=1e-6)
    assert result.transport.tls and result.transport.mutual_tls and result.transport.node_auth
    assert len(result.history) == plan.rounds + 1 and len(result.timing.round_s) == plan.rounds
    assert not result.dropped
    folder = deployment.run_folder(run)
    for name in ("result.json", "events.jsonl", "model.safetensors", "model_card.md", "rounds.png", "config.yaml"):
        assert (folder / name).stat().st_size > (0 if name == "config.yaml" else 10) - 1, name
    assert not list((folder / "spool").iterdir()) and not list((deployment.server_home / "transit").iterdir())


def test_both_ends_answer_their_people(deployment):
    code, out, _ = command("server", "runs", "--home", str(deployment.server_home), "--json")
    assert code == 0 and json.loads(out)["runs"]
    home = str(deployment.site_home("va"))
    code, out, _ = command("client", "status", "--home", home, "--json")
    status = json.loads(out)
    assert code == 0 and status["connected"] and status["study"] == "heart" and status["bytes_sent"] > 0
    assert 0 < status["epsilon"]["spent"] < status["epsilon"]["cap"] == 1000
    code, out, _ = command("client", "egress", "--home", home, "--json")
    rows = json.loads(out)["rows"]
    assert code == 0 and {"time", "run", "round", "bytes", "sha256", "epsilon"} <= rows[-1].keys()
    assert command("client", "status", "--home", home)[0] == 0, "and in a table"
    assert command("server", "status", "--home", str(deployment.server_home))[0] == 0


@pytest.mark.slow
def test_a_sites_signed_records_hold_and_can_be_verified_elsewhere(deployment, tmp_path):
    deployment.finish(
        deployment.submit(deployment.plan("rounds=1"))
    )  # private, so that the ledger has settled something
    home, file = str(deployment.site_home("va")), tmp_path / "export.json"
    code, out, err = command("client", "audit", "verify", "--home", home, "--json")
    assert code == 0 and json.loads(out)["wrong"] == [], out + err
    code, out, _ = command("client", "audit", "show", "--home", home, "--json")
    done = {row["what"] for row in json.loads(out)["rows"]}
    assert code == 0 and {"started", "policy", "joined", "plan", "data", "settled", "released"} <= done
    assert command("client", "audit", "export", str(file), "--home", home)[0] == 0
    assert verify_audit.main([str(file), "--ca", str(deployment.site_home("va") / "keys" / "ca.pem")]) == 0
    code, out, _ = command("client", "ledger", "--home", home)
    assert code == 0 and "heart: epsilon" in out and "rounds settled, 0 open" in out and "head: ledger:" in out


def test_a_study_can_be_stopped_and_taken_up_again(deployment):
    plan = deployment.plan("privacy=none", "rounds=6", "local.steps=150", "local.lr=0.02")
    run = deployment.submit(plan)
    deployment.until(lambda: deployment.status(run)["round"] >= 1, 60, "a first round")
    assert command("server", "stop", run, "--home", str(deployment.server_home))[0] == 0
    deployment.until(lambda: deployment.status(run)["status"] == "stopped", 60, "the run stops")
    closed = deployment.status(run)["round"]
    assert 1 <= closed < plan.rounds
    partial = json.loads((deployment.run_folder(run) / "result.json").read_text())
    assert partial["status"] == "stopped" and partial["rounds"] == closed
    assert command("server", "submit", "--resume", run, "--home", str(deployment.server_home))[0] == 0
    deployment.finish(run)
    simulated, params = simulate(plan, heart_disease())
    deployed = load_file(deployment.run_folder(run) / "model.safetensors")
    assert norm({name: deployed[name] - params[name] for name in params}) < 1e-5


def test_watch_follows_a_run_to_its_end(deployment):
    run = deployment.submit(deployment.plan("privacy=none", "rounds=2"))
    code, out, _ = command("server", "watch", run, "--home", str(deployment.server_home), "--json")
    kinds = [json.loads(line)["kind"] for line in out.splitlines()]
    assert (
        code == 0
        and kinds[0] == "proposal"
        and "started" in kinds
        and kinds[-1] == "finished"
        and kinds.count("round") == 2
    )


@pytest.mark.parametrize(
    ("overrides", "code"),
    [
        (["study=heart", "sites=[cleveland,mars]", "quorum=1"], "mars"),
        (["study=heart", "sites=[cleveland,va]", "strategy=fedavgg"], "did you mean 'fedavg'"),
        pytest.param(["study=heart", "sites=[cleveland,va]", "quorum=3"], "quorum", marks=pytest.mark.slow),
        pytest.param(
            ["study=heart", "sites=[cleveland,va]", "quorum=2", "+recipe.hiden=3"], "hiden", marks=pytest.mark.slow
        ),
    ],
)
def test_a_plan_that_cannot_work_is_refused_by_name(deployment, overrides, code):
    status, _, err = command("server", "submit", *overrides, "--home", str(deployment.server_home))
    assert status == 2 and code in " ".join(err.split()) and "Traceback" not in err


def test_a_site_refuses_what_its_budget_does_not_allow_before_any_work(deployment):
    """The cap is 1000: a study with almost no noise would pass it within a few rounds."""
    plan = deployment.plan("rounds=1", "privacy.epsilon=900000", "privacy.noise_multiplier=0.4", "local.steps=3000",
                           "local.rate=1.0")  # fmt: skip
    run = deployment.submit(plan)
    deployment.until(lambda: deployment.status(run)["status"] == "failed", 60, "the run fails")
    assert "budget" in deployment.status(run)["detail"] and "quorum" in deployment.status(run)["detail"]
    status = deployment.ask_site("va", "Status")
    assert "rounds" in status["last_error"] and status["epsilon"]["spent"] < 1000
