"""A study on Flower's own simulation runtime: refusals, what its process says, and the block engine's parameters."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fedtailor.cli import app
from fedtailor.config import build, load
from fedtailor.datasets import Loaded
from fedtailor.errors import ConfigError, ContractError, FedtailorError
from fedtailor.recipe import Part
from fedtailor.simulations import composed, flower_engine
from fedtailor.simulations.cohort import prepared

HEART = ["study=heart", "privacy=none", "rounds=3", "simulation.engine=flower"]
REFUSED = {  # changes of the plan, of the simulation
    "population": ({}, {"population": {"partition": "iid", "clients": 8, "cohort": 4}}),
    "simulation.policy": ({}, {"policy": "rules.yaml"}),
    "simulation.step_s": ({}, {"step_s": {"va": 2}}),
    "buffer": ({"buffer": {"answers": 3}, "quorum": 2}, {}),
    "simulation.device": ({}, {"device": "cuda"}),
    "simulation.precision": ({}, {"precision": "bf16"}),
    "simulation.ray": ({}, {"ray": "local"}),
    "local.within_s": ({"local": {"steps": 4, "rate": 0.5, "lr": 0.5, "within_s": 5}}, {}),
}


@pytest.fixture
def with_ray(monkeypatch):
    """As if Ray were installed."""
    monkeypatch.setattr(flower_engine.importlib.util, "find_spec", lambda name: name)


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Another program in place of the process, in the same session and with the same pipes; the folder it is given."""
    real, scratch = subprocess.Popen, tmp_path / "scratch"
    scratch.mkdir()

    def install(program):
        def start(command, **how):
            assert command[1:4] == ["-P", "-m", "fedtailor.cli.virtual_nodes"] and how["start_new_session"]
            return real([sys.executable, "-S", "-c", program], **how)

        monkeypatch.setattr(flower_engine.subprocess, "Popen", start)
        return scratch

    return install


def followed(scratch, on_event=lambda event: None):
    with flower_engine._process(scratch, None) as process:
        return flower_engine._followed(process, on_event), process


def changed(value, changes):
    return type(value).model_validate(value.model_dump(by_alias=True) | changes)


@pytest.fixture(scope="module")
def heart():
    return load(HEART)


@pytest.mark.parametrize("setting", REFUSED)
def test_what_it_cannot_do_is_refused_by_name_with_the_way_out(with_ray, heart, setting):
    flower_engine.check(*heart)
    given = [changed(value, changes) for value, changes in zip(heart, REFUSED[setting], strict=True)]
    with pytest.raises(ConfigError, match=f"^{setting}: not with .*; {setting}=.*, or simulation.engine=block$"):
        flower_engine.check(*given)


def test_without_ray_it_says_what_to_install(monkeypatch, heart):
    monkeypatch.setattr(flower_engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fedtailor\[ray\]'"):
        composed.run(heart)


def test_it_cannot_be_resumed(tmp_path):
    done = CliRunner().invoke(app, ["simulate", *HEART, "--resume", "--out", str(tmp_path)])
    assert isinstance(done.exception, ConfigError) and str(done.exception).startswith("--resume: not with")


def test_data_are_judged_before_anything_is_started(with_ray, heart, monkeypatch, plan, sources):
    monkeypatch.setattr(flower_engine.subprocess, "Popen", None)
    monkeypatch.setattr(flower_engine, "build", lambda spec, kind: sources if kind is dict else build(spec, kind))
    south = sources["south"].table()
    sources["south"] = Loaded(south | {"a": ["many", *south["a"][1:]]})
    with pytest.raises(ContractError, match="^south: "):
        flower_engine.simulate(plan(), heart.simulation)


def test_a_site_without_a_row_to_train_on_is_refused(with_ray, heart, monkeypatch, plan, sources):
    def without(plan, recipe, sources):
        data = prepared(plan, recipe, sources)
        none = Part(data["south"].train.x[:0], data["south"].train.y[:0])
        return data | {"south": data["south"]._replace(train=none)}

    monkeypatch.setattr(flower_engine.subprocess, "Popen", None)
    monkeypatch.setattr(flower_engine, "build", lambda spec, kind: sources if kind is dict else build(spec, kind))
    monkeypatch.setattr(flower_engine, "prepared", without)
    with pytest.raises(ConfigError, match="^sites: south have no row to train on; leave them out"):
        flower_engine.simulate(plan(quorum=2), heart.simulation)


def test_an_error_comes_back_as_what_it_was_with_the_reason_of_a_site_that_failed(stand_in):
    lines = [
        {"kind": "round", "round": 1},
        {"kind": "failed", "site": "va", "why": "Traceback\n  of much\nValueError: no\n"},
        {"kind": "error", "type": "ConfigError", "code": "quorum", "text": "too few"},
    ]
    seen = []
    scratch = stand_in(f"for line in {[json.dumps(line) for line in lines]}: print(line, flush=True)")
    with pytest.raises(ConfigError, match="^too few; va: ValueError: no$") as caught:
        followed(scratch, seen.append)
    assert caught.value.code == "quorum" and seen == lines[:2]


def test_an_end_without_a_result_is_no_result(stand_in):
    done, process = followed(stand_in("raise SystemExit(3)"))
    assert done is False and process.returncode is not None


def test_its_environment_keeps_flower_and_ray_to_themselves(stand_in, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of another Ray")
    names = ("TMPDIR", "FLWR_HOME", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_USAGE_STATS_ENABLED",
             "FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK")  # fmt: skip
    seen = []
    scratch = stand_in(f"import json, os\nprint(json.dumps({{'kind': 'env'}} | {{n: os.environ[n] for n in {names}}}))")
    followed(scratch, seen.append)
    (found,) = seen
    assert (
        found["TMPDIR"] == str(scratch)
        and found["FLWR_HOME"].startswith(str(scratch))
        and found["RAY_AUTH_MODE"] == "token"
    )
    assert len(found["RAY_AUTH_TOKEN"]) == 64
    assert {found[name] for name in names[4:]} == {"0", "1"} and found["FLWR_DISABLE_UPDATE_CHECK"] == "1"


def test_rays_sockets_lie_where_their_names_fit(monkeypatch):
    for folder, taken in (("/tmp", "/tmp"), ("/var/tmp", "/var/tmp"), ("/scratch/" + "job" * 10, "/tmp")):
        monkeypatch.setattr(tempfile, "tempdir", folder)
        assert flower_engine._short() == taken


def test_whatever_its_process_started_ends_with_the_context(stand_in):
    program = (
        "import json, subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])\n"
        "print(json.dumps({'kind': 'child', 'pid': p.pid}), flush=True)\ntime.sleep(600)"
    )
    seen = []

    def interrupted(event):
        seen.append(event["pid"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        followed(stand_in(program), interrupted)
    until(lambda: not alive(seen[0]))


def alive(pid):
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return "Z" != Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition):
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def left():
    return sorted(Path(tempfile.gettempdir()).glob("flower-*"))


@pytest.mark.slow
@pytest.mark.timeout(900)  # Ray starts nine processes
@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_the_block_engines_parameters_come_out(strategy, monkeypatch, tmp_path):
    pytest.importorskip("ray")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    before, events = left(), []
    made = composed.run(load([*HEART, f"strategy={strategy}", "simulation.workers=2"]), events.append)
    block = composed.run(load([*HEART[:-1], f"strategy={strategy}"]))
    assert made.params.keys() == block.params.keys()
    for name, x in block.params.items():
        torch.testing.assert_close(made.params[name], x, rtol=0, atol=1e-5)
    for kind in block.result.metrics:
        assert made.result.metrics[kind] == pytest.approx(block.result.metrics[kind], abs=1e-4)
    assert [h["round"] for h in made.result.history] == [h["round"] for h in block.result.history]
    assert made.result.engine == "flower simulation" and made.result.transport is None and not made.result.dropped
    assert made.result.simulation["engine"] == "flower" and "engine" not in block.result.simulation
    assert [(e["round"], e["clients"]) for e in events if e["kind"] == "round"] == [(1, 4), (2, 4), (3, 4)]
    assert left() == before and not (tmp_path / ".flwr").exists() and not (tmp_path / ".ray").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_noise_is_secret_and_its_cost_stated():
    pytest.importorskip("ray")
    settings = [*HEART[:1], "rounds=1", "simulation.engine=flower", "evaluation.baseline=false"]
    one, other = composed.run(load(settings)), composed.run(load(settings))
    assert any(not torch.equal(one.params[name], other.params[name]) for name in one.params)
    assert 2.5 < one.result.privacy.epsilon_max <= 3


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_nothing_outlives_a_run_that_is_ended(by, tmp_path):
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "fedtailor", "simulate", *HEART, "rounds=100000", "--out", str(tmp_path / "out")]
    environment = os.environ | {"TMPDIR": tempfile.mkdtemp(prefix="f-", dir="/tmp")}
    wake = (
        "import signal, sys, runpy; signal.signal(signal.SIGINT, signal.default_int_handler); sys.argv = sys.argv[1:]; "
    )
    started = subprocess.Popen(
        [command[0], "-c", wake + "runpy.run_module('fedtailor', run_name='__main__')", *command[2:]],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: any("ClientAppActor" in name for name in session_of(started.pid).values()))
        members = session_of(started.pid)
        assert len(members) > 5  # Ray's own among them
        started.send_signal(by)
        assert started.wait(timeout=60) == (130 if by == signal.SIGINT else -by)
        until(lambda: not any(alive(pid) for pid in members))
        assert by == signal.SIGKILL or not list(Path(environment["TMPDIR"]).iterdir())
    finally:
        started.kill()
        started.wait()


def session_of(starter):
    """The processes of the session that the first of ``starter``'s children leads, by number."""
    rows = subprocess.run(["ps", "-eo", "pid,ppid,sid,args", "ww"], capture_output=True, text=True, check=True).stdout
    found = [line.split(None, 3) for line in rows.splitlines()[1:]]
    leaders = {sid for pid, ppid, sid, _ in found if int(ppid) == starter and pid == sid}
    return {int(pid): args for pid, _, sid, args in found if sid in leaders}


def test_a_failure_of_the_runtime_is_named(with_ray, stand_in, heart):
    stand_in("import sys; sys.stderr.write('much\\nRuntimeError: no room\\n'); raise SystemExit(3)")
    with pytest.raises(FedtailorError, match="ended with code -?[0-9]+: RuntimeError: no room$") as caught:
        composed.run(heart)
    assert caught.value.code == "flower"
