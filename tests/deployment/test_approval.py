"""People decide at a site: they see a plan, rehearse it, let it run, let its last answer leave; and what was said came true."""

import json
import subprocess
import sys

import pytest

from fedtailor import seals
from fedtailor.receipts import Receipt

pytestmark = pytest.mark.deployment


@pytest.fixture(scope="module")
def careful(deployment):
    """The site va with people who decide, until these tests end."""
    path = deployment.site_home("va") / "site.yaml"
    before = path.read_text()

    def restart(text):
        path.write_text(text)
        deployment.processes["va"].terminate()
        deployment.processes["va"].wait(timeout=30)
        deployment.start("va")
        deployment.until(lambda: deployment.ask_site("va", "Status")["connected"], 60, "va is back")

    restart(before.replace("approval: policy", "approval: person\n  hold: last"))
    deployment.restart_va = restart
    yield deployment
    restart(before)


def client(deployment, *words, site="va"):
    command = [sys.executable, "-m", "fedtailor", "client", *words, "--home", str(deployment.site_home(site)), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=deployment.folder)
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def pending(deployment, run):
    rows = client(deployment, "plans")[1]["rows"]
    return any(row["run"] == run and row["state"] == "pending" for row in rows)


def test_a_study_waits_for_people_and_takes_what_was_foretold(careful):
    run = careful.submit(careful.plan("rounds=3", "privacy.epsilon=2"))
    careful.until(lambda: pending(careful, run), 60, "va has the plan")
    assert careful.status(run)["status"] == "proposed"
    code, foretold = client(careful, "check", run)
    assert code == 0 and foretold["state"] == "pending" and foretold["forecast"]["seconds_a_round"] > 0
    assert client(careful, "explain", run)[0] == 0
    assert careful.status(run)["status"] == "proposed"  # a rehearsal lets nothing run
    code, approved = client(careful, "approve", foretold["hash"][:12])
    assert code == 0 and approved["state"] == "approved"
    careful.until(lambda: client(careful, "held")[1]["rows"], 60, "the last answer is held")
    (row,) = client(careful, "held")[1]["rows"]
    assert (row["run"], row["round"]) == (run, 2)
    assert client(careful, "release", row["answer"])[0] == 0
    result = careful.finish(run)
    assert result["dropped"] == []

    forecast, left = foretold["forecast"], client(careful, "egress")[1]["rows"]
    of_run = [line for line in left if line.get("run") == run]
    assert sum(line["bytes"] for line in of_run) == pytest.approx(forecast["bytes_out"], rel=0.01)
    assert result["sites"]["va"]["epsilon"] == pytest.approx(forecast["epsilon"], rel=0.01)
    trained = [line for line in of_run if line.get("tensors")]
    assert len(trained) == 3 and all(line["norm"] > 0 and len(line["sha256"]) == 64 for line in trained)

    signer = seals.load_public(careful.site_home("va") / "keys" / "plans.pub")
    kept = client(careful, "receipts", run)[1]["receipts"]
    receipts = [Receipt.model_validate_json(one["receipt"]) for one in kept]
    assert [one.round for one in receipts] == [0, 1, 2]
    assert [one.summand_sha256 for one in receipts] == [line["sha256"] for line in trained]
    for one, receipt in zip(kept, receipts, strict=True):
        assert receipt.holds() and seals.genuine(signer, "receipt", one["receipt"], one["seal"])
    events = [json.loads(line) for line in (careful.run_folder(run) / "events.jsonl").read_text().splitlines()]
    assert [e["root"] for e in events if e["kind"] == "round"] == [one.root for one in receipts]


def test_a_study_that_is_refused_in_its_middle_stops_there_and_no_further_answer_leaves(careful):
    run = careful.submit(careful.plan("rounds=200", "privacy=none", "quorum=1"))
    careful.until(lambda: pending(careful, run), 60, "va has the plan")
    client(careful, "approve", run)
    careful.until(lambda: careful.status(run)["round"] >= 2, 60, "it runs")
    assert client(careful, "refuse", run)[1]["state"] == "refused"
    at = careful.status(run)["round"]
    careful.until(lambda: careful.status(run)["round"] >= at + 4, 60, "it goes on with the other site")
    careful.ask("Stop", run=run)
    careful.until(lambda: careful.status(run)["status"] == "stopped", 60, "it is over")
    result = json.loads((careful.run_folder(run) / "result.json").read_text())
    codes = {(one["site"], one["code"]) for one in result["dropped"]}
    assert codes == {("va", "refused")}
    rows = [line for line in client(careful, "egress")[1]["rows"] if line.get("run") == run and line.get("tensors")]
    assert max(line["round"] for line in rows) <= at + 1


def test_a_plan_that_the_policy_refuses_is_explained_and_cannot_be_approved(careful):
    run = careful.submit(careful.plan("rounds=3", "privacy.delta=0.001", "quorum=1"))
    careful.until(lambda: run in [row["run"] for row in client(careful, "plans")[1]["rows"]], 60, "va has the plan")
    code, said = client(careful, "explain", run)
    assert code == 3 and [rule["code"] for rule in said["rules"] if not rule["ok"]] == ["delta"]
    assert client(careful, "check", run)[0] == 3 and client(careful, "approve", run)[0] == 3
    careful.until(lambda: careful.status(run)["status"] == "failed", 60, "nobody agrees")
    assert "va: delta" in careful.status(run)["detail"]


@pytest.mark.slow
def test_two_officers_approve_with_their_keys(careful, tmp_path):
    def officer(*words):
        command = [sys.executable, "-m", "fedtailor", "client", "officer", *words, "--json"]
        return json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)

    names = [officer(str(tmp_path / f"{name}.key"))["officer"] for name in ("ann", "bob")]
    text = (careful.site_home("va") / "site.yaml").read_text()
    officers = f"policy:\n  officers: [{', '.join(names)}]\n  officers_needed: 2\n"
    careful.restart_va(text.replace("policy:\n", officers).replace("hold: last", "hold: nothing"))
    run = careful.submit(careful.plan("rounds=1", "privacy=none"))
    careful.until(lambda: pending(careful, run), 60, "va has the plan")
    assert client(careful, "approve", run)[0] == 3  # a person's word is not enough
    for name, state in (("ann", "pending"), ("ann", "pending"), ("bob", "approved")):
        code, said = client(careful, "approve", run, "--key", str(tmp_path / f"{name}.key"))
        assert (code, said["state"]) == (0, state)
    assert careful.finish(run)["dropped"] == []


@pytest.mark.slow
def test_a_site_withdraws_and_what_contains_it_is_known(careful):
    def server(*words):
        command = [sys.executable, "-m", "fedtailor", "server", *words, "--home", str(careful.server_home), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=careful.folder)
        return done.returncode, json.loads(done.stdout.splitlines()[-1])

    run = careful.submit(careful.plan("rounds=2", "privacy=none", "quorum=1"))
    careful.until(lambda: pending(careful, run), 60, "va has the plan")
    assert client(careful, "withdraw", "--study", "heart")[0] == 0
    result = careful.finish(run)
    assert ("va", "withdrawn") in {(one["site"], one["code"]) for one in result["dropped"]}
    careful.until(lambda: client(careful, "withdraw", "--study", "heart")[1]["notices"][0]["told"], 60, "it is told")
    code, refused = server("submit", "study=heart", "sites=[cleveland,va]", "quorum=1", "privacy=none")
    assert code == 2 and "withdrawn" in refused["text"]
    models = {row["run"]: row for row in server("models")[1]["rows"]}
    assert models[run]["sites"] == ["cleveland"] and models[run]["withdrawn"] == []
    containing = [row for row in models.values() if "va" in row["sites"]]
    assert all(row["withdrawn"] == ["va"] for row in containing)
    for row in containing[:1]:
        code, again = server("retrain", row["run"], "--without", "va")
        assert code == 0
        careful.finish(again["run"])
        assert {r["run"]: r for r in server("models")[1]["rows"]}[again["run"]]["sites"] == ["cleveland"]
    assert client(careful, "withdraw", "--back")[1]["state"] == "back"
    careful.until(lambda: all(n["told"] for n in client(careful, "withdraw", "--back")[1]["notices"][:-1]), 60, "told")
