"""A simulation that was killed goes on from its checkpoint and ends bit for bit as if nothing had happened."""

import json
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from fedtailor.cli import app
from fedtailor.cli.simulate import followed
from fedtailor.config import load
from fedtailor.errors import ConfigError, RefusedError, StoreError
from fedtailor.policy import Policy
from fedtailor.result import model_bytes
from fedtailor.simulations import standing
from fedtailor.simulations.run import simulate

SITE = {"unit": "site", "epsilon": 8.0, "delta": 1e-4, "clip": 1.0, "noise_multiplier": 1.0}
PLANS = {
    "plain": {},
    "a memory at each site": {"strategy": {"_target_": "fedtailor.strategies.scaffold", "population": 3}},
    "a memory at the server": {"strategy": {"_target_": "fedtailor.strategies.fedadam", "lr": 0.1}},
    "a wrapper round no memory": {
        "strategy": {"_target_": "fedtailor.strategies.topk", "fraction": 0.5, "of": {"name": "fedavg"}}
    },
    "models of their own": {"strategy": {"_target_": "fedtailor.strategies.ditto"}},
    "record-level": {"privacy": {"epsilon": 3.0, "delta": 1e-4, "clip": 1.0}},
    "site-level": {"privacy": SITE},
    "a clip that adapts": {"privacy": SITE | {"noise_multiplier": 2.0, "adaptive": {"count_noise": 1.5}}},
    "answers on their way": {"buffer": {"answers": 2}, "quorum": 1},
}
RULES = Policy(studies=("made-up",), epsilon=100.0, delta=1e-3, without_privacy=True)


class Killed(Exception):
    pass


def killed_after(rounds):
    def on_event(event):
        if event["kind"] == "round" and event["round"] == rounds:
            raise Killed

    return on_event


def same(one, other):
    """Two results but for their times."""
    return [r.model_dump(mode="json", exclude={"timing"}) for r in (one, other)]


FIRST = ("a memory at each site", "record-level")  # others: `make test-slow`


@pytest.mark.parametrize("name", [n if n in FIRST else pytest.param(n, marks=pytest.mark.slow) for n in PLANS])
def test_it_ends_the_same_bit_for_bit(plan, sources, tmp_path, name):
    made = plan(rounds=6, evaluation={"baseline": False, "every": 2}, **PLANS[name])
    also = {"step_s": {"west": 7.0}} if made.buffer else {}
    whole, params = simulate(made, sources, **also)
    at = {"checkpoint": tmp_path / "deep" / "checkpoint", "every_s": 0.0}
    for stop in (2, 5):
        with pytest.raises(Killed):
            simulate(made, sources, **also, **at, resume=True, on_event=killed_after(stop))
    rounds = []
    again, same_params = simulate(made, sources, **also, **at, resume=True, on_event=rounds.append)
    assert [e["round"] for e in rounds if e["kind"] == "round"] == [5, 6]
    assert model_bytes(params) == model_bytes(same_params)
    first, second = same(whole, again)
    assert first == second and len(again.timing.round_s) == 6


def test_what_the_sites_rules_dropped_stays_out(plan, sources, tmp_path):
    """The site whose answers are too long is out from round 0 on, also after a restart."""
    made = plan(rounds=4, quorum=2, norm=50.0, evaluation={"baseline": False})
    rules = dict.fromkeys(made.sites, RULES)
    at = {"checkpoint": tmp_path / "checkpoint", "every_s": 0.0, "policies": rules}
    whole, params = simulate(made, sources, policies=rules)
    assert [(d["site"], d["code"]) for d in whole.dropped] == [("west", "airlock-norm")], "the test needs one that is"
    with pytest.raises(RefusedError, match="round 0: too few answers passed the airlock"):
        simulate(made.model_copy(update={"norm": 1e-6}), sources, policies=rules)
    with pytest.raises(Killed):
        simulate(made, sources, **at, on_event=killed_after(2))
    again, same_params = simulate(made, sources, **at, resume=True)
    first, second = same(whole, again)
    assert first == second and model_bytes(params) == model_bytes(same_params)


@pytest.mark.parametrize("change", [{"rounds": 7}, {"seed": 3}, {"local": {"steps": 3, "rate": 0.4, "lr": 0.3}}])
def test_a_checkpoint_of_another_study_is_refused(plan, sources, tmp_path, change):
    at = {"checkpoint": tmp_path / "checkpoint", "every_s": 0.0, "resume": True}
    with pytest.raises(Killed):
        simulate(plan(), sources, **at, on_event=killed_after(1))
    with pytest.raises(ConfigError, match="checkpoint is of a study with other settings or other data; give those"):
        simulate(plan(**change), sources, **at)
    with pytest.raises(ConfigError, match="other settings"):
        simulate(plan(), sources | {"north": sources["south"]}, **at)
    with pytest.raises(ConfigError, match="other settings"):
        simulate(plan(), sources, block=1, **at)


def test_a_damaged_checkpoint_is_refused_and_one_round_is_not_a_new_begin(plan, sources, tmp_path):
    at = {"checkpoint": tmp_path / "checkpoint", "every_s": 0.0}
    with pytest.raises(Killed):
        simulate(plan(), sources, **at, on_event=killed_after(1))
    raw = bytearray(at["checkpoint"].read_bytes())
    raw[-1] ^= 1
    at["checkpoint"].write_bytes(raw)
    with pytest.raises(StoreError, match="damaged"):
        simulate(plan(), sources, **at, resume=True)
    assert simulate(plan(), sources, **at)[0].rounds == 3  # begun anew


def test_nothing_is_written_before_its_time(plan, sources, tmp_path):
    simulate(plan(), sources, checkpoint=tmp_path / "checkpoint", every_s=3600.0)
    assert not list(tmp_path.iterdir())


WORDS = ["study=heart", "privacy=none", "rounds=120", "evaluation.baseline=false", "simulation.checkpoint_s=0"]


def test_kill_9_and_resume_on_the_command_line(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = CliRunner().invoke(app, ["simulate", *WORDS, "simulation.checkpoint_s=60", "--out", str(whole), "--json"])
    assert done.exit_code == 0, done.output
    command = [sys.executable, "-m", "fedtailor", "simulate", *WORDS, "--out", str(cut)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + 120
    while not (cut / "checkpoint.safetensors").exists() and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL and not (cut / "result.json").exists()
    other = CliRunner().invoke(app, ["simulate", *WORDS, "seed=5", "--out", str(cut), "--resume"])
    assert other.exit_code != 0 and "other settings" in f"{other.output}{other.exception}"
    done = CliRunner().invoke(app, ["simulate", *WORDS, "--out", str(cut), "--resume", "--json"])
    assert done.exit_code == 0, done.output
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not (cut / "checkpoint.safetensors").exists()


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was(tmp_path, monkeypatch):
    words = ["simulate", *WORDS[:2], "evaluation.baseline=false", "-m", "rounds=1,2", "--out", str(tmp_path), "--json"]
    assert CliRunner().invoke(app, words).exit_code == 0
    kept, stamp = tmp_path / "rounds=1" / "result.json", (tmp_path / "rounds=1" / "result.json").stat().st_mtime_ns
    (tmp_path / "rounds=2" / "result.json").unlink()
    done = CliRunner().invoke(app, [*words, "--resume"])
    assert done.exit_code == 0 and (tmp_path / "rounds=2" / "result.json").exists()
    assert kept.stat().st_mtime_ns == stamp and len(json.loads(done.stdout)["rows"]) == 2
    assert CliRunner().invoke(app, [*words, "seed=1", "--resume"]).exit_code == 0
    assert kept.stat().st_mtime_ns != stamp, "of another seed"
    stamp = kept.stat().st_mtime_ns
    assert CliRunner().invoke(app, [*words, "seed=1", "+simulation.step_s.va=2.0", "--resume"]).exit_code == 0
    assert kept.stat().st_mtime_ns != stamp, "by another clock"
    stamp, of = kept.stat().st_mtime_ns, ["population=iid", "population.clients=20", "population.cohort=5"]
    assert CliRunner().invoke(app, [*words, "seed=1", "+simulation.step_s.va=2.0", *of, "--resume"]).exit_code == 0
    assert kept.stat().st_mtime_ns != stamp, "of a population"
    rules, stamp = tmp_path / "rules.yaml", kept.stat().st_mtime_ns
    for text in ("", "max_rounds: 50\n"):
        rules.write_text("studies: [heart]\nepsilon: 9\ndelta: 1e-3\nwithout_privacy: true\n" + text)
        for again in (False, True):
            said = CliRunner().invoke(app, [*words, "seed=1", f"simulation.policy={rules}", "--resume"])
            assert said.exit_code == 0 and (kept.stat().st_mtime_ns == stamp) == again, said.output
            stamp = kept.stat().st_mtime_ns


def test_a_runs_seconds_are_those_of_all_its_processes(plan, sources, tmp_path, monkeypatch):
    save = standing.save
    longer = lambda path, at, also, digest: save(path, at, also | {"wall_s": also["wall_s"] + 1000}, digest)  # noqa: E731
    at = {"checkpoint": tmp_path / "checkpoint", "every_s": 0.0}
    monkeypatch.setattr(standing, "save", longer)
    for stop in (1, 2):
        with pytest.raises(Killed):
            simulate(plan(), sources, **at, resume=True, on_event=killed_after(stop))
    monkeypatch.setattr(standing, "save", save)
    timing = simulate(plan(), sources, **at, resume=True)[0].timing
    assert 2000 < timing.wall_s < 3000 and timing.setup_s < 1000


def test_epsilon_is_shown_rounded_up(monkeypatch):
    shown = []

    class Bar:
        def add_task(self, *_, **__):
            return 0

        def update(self, _, said="", **__):
            shown.append(said)

    monkeypatch.setattr("fedtailor.simulations.composed.spent", lambda experiment, rounds: 2.00001)
    followed(Bar(), "heart", load(["study=heart"]))({"kind": "round", "round": 3, "clients": 8, "seconds": 2.0})
    assert shown == ["4 clients/s ε 2.001"]
