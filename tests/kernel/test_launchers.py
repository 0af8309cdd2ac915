"""Sweeps whose runs are done by joblib, Ray or submitit: the same results, failures by name, and nothing left running."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from errands import errand
from typer.testing import CliRunner

from fedtailor.cli import app, launchers
from fedtailor.cli.launchers import LAUNCHERS, Room, Task, at_once, by_joblib, threads_each
from fedtailor.errors import ConfigError

QUICK = ["study=heart", "privacy=none", "evaluation.baseline=false", "rounds=1"]
AWAY = ["joblib", "ray", "submitit"]


def invoke(*words):
    return CliRunner().invoke(app, ["simulate", *QUICK, *words])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("-m --launcher jobbly", "there is no such launcher; there are local, joblib, ray, submitit"),
        ("-m --jobs 2", "local runs one after the other; add --launcher joblib"),
        ("-m --launcher joblib --submitit mem_gb=8", "--submitit mem_gb: is for --launcher submitit"),
        ("-m --launcher submitit --submitit mem_gb", "--submitit mem_gb: write KEY=VALUE"),
        ("-m hydra/launcher=joblib", "launchers are options here: --launcher joblib --jobs 4"),
        ("-m hydra.launcher.n_jobs=4", "launchers are options here"),
        ("--launcher joblib", "are for a sweep; add -m"),
        ("--jobs 2", "are for a sweep; add -m"),
        ("-m --launcher ray", "pip install 'fedtailor[ray]'"),
        ("-m --launcher submitit", "pip install 'fedtailor[slurm]'"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(words, said, tmp_path, monkeypatch):
    for name in ("ray", "submitit"):
        monkeypatch.setitem(sys.modules, name, None)
    done = invoke(*words.split(), "--out", str(tmp_path / "s"))
    assert isinstance(done.exception, ConfigError) and said in str(done.exception)
    assert not (tmp_path / "s").exists() and "RAY_AUTH_TOKEN" not in os.environ


def test_each_folder_is_given_to_the_launcher_once_and_answers_find_their_runs(tmp_path, monkeypatch):
    given = []

    def backwards(work, tasks, room):
        given.extend(tasks)
        yield from [(task.folder, f"no luck with {task.overrides[-1]}") for task in reversed(tasks)]

    monkeypatch.setitem(LAUNCHERS, "joblib", backwards)
    words = "-m seed=3,4,3 --launcher joblib --resume --json --out".split()
    done = invoke(*words, str(tmp_path))
    assert given == [Task([*QUICK, f"seed={n}"], str(tmp_path / f"seed={n}"), True) for n in (3, 4)]
    runs = json.loads(done.stdout)["runs"]
    assert done.exit_code == 1 and [run["error"] for run in runs] == [f"no luck with seed={n}" for n in (3, 4, 3)]


def test_processes_share_the_cores_unless_somebody_said_otherwise(monkeypatch):
    monkeypatch.setattr(launchers, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "5")
    for jobs, threads in ((3, "2"), (9, "1")):
        with threads_each(jobs):
            assert (os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"]) == (threads, "5")
    assert "OMP_NUM_THREADS" not in os.environ and os.environ["MKL_NUM_THREADS"] == "5"
    some = [Task([], str(n), False) for n in range(10)]
    assert [at_once(some[:many], Room(jobs, Path())) for many, jobs in ((2, 5), (9, 5), (9, None))] == [2, 5, 8]


def answers(tmp_path, *kinds):
    tasks = [Task([kind], str(tmp_path / str(n)), n == 1) for n, kind in enumerate(kinds)]
    found = dict(by_joblib(errand, tasks, Room(2, tmp_path)))
    assert set(found) == {task.folder for task in tasks}
    return [found[task.folder] for task in tasks]


def test_joblib_runs_in_processes_of_its_own_which_end(tmp_path, monkeypatch):
    monkeypatch.setattr(launchers, "cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    none, *words = answers(tmp_path, "works", "tells", "tells")
    assert none is None
    pids, threads, resume = zip(*(word.split() for word in words), strict=True)
    assert threads == ("3", "3") and resume == ("True", "False")
    assert str(os.getpid()) not in pids and not any(Path("/proc", pid).exists() for pid in pids)


@pytest.mark.slow
def test_a_process_that_is_killed_is_named_and_the_others_go_on(tmp_path):
    found = answers(tmp_path, "works", "dies", "works", "dies", "works")
    assert found == [None, launchers.KILLED, None, launchers.KILLED, None]


@pytest.mark.slow
def test_what_was_killed_beside_others_is_run_again_by_itself(tmp_path):
    first, *rest = answers(tmp_path, "dies once", "works", "works")
    assert rest == [None, None] and first.endswith("False") and Path(tmp_path, "0.began").exists()


def command(launcher, folder, *words):
    there = {"submitit": ["--submitit", "cluster=local"]}.get(launcher, [])
    options = [*words, "--launcher", launcher, "--jobs", "2", *there, "--json", "--out", str(folder)]
    return [sys.executable, "-m", "fedtailor", "simulate", *QUICK, "-m", *options]


def swept(launcher, folder, *words):
    done = subprocess.run(command(launcher, folder, *words), capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", AWAY)
def test_results_are_those_of_one_after_the_other(launcher, tmp_path):
    pytest.importorskip(launcher)
    words = ["seed=0,1,0", "local.lr=0.25,-1"]
    one = invoke("-m", *words, "--json", "--out", str(tmp_path / "one"))
    code, found = swept(launcher, tmp_path / "other", *words)
    there = json.loads(one.stdout)
    assert code == one.exit_code == 1
    for run in [*there["runs"], *found["runs"]]:
        run["folder"] = Path(run["folder"]).name
    for row in [*there["rows"], *found["rows"]]:
        del row["seconds"]
    assert found == there and [bool(run["error"]) for run in found["runs"]] == [False, True] * 3
    (result,) = (tmp_path / "one").glob("seed=1*/result.json")
    other = tmp_path / "other" / result.parent.name / "result.json"
    assert json.loads(other.read_text())["model"] == json.loads(result.read_text())["model"]
    if launcher == "joblib":  # the others are told to resume in the same way
        kept = other.stat().st_mtime_ns
        assert swept(launcher, tmp_path / "other", *words, "--resume")[0] == 1 and other.stat().st_mtime_ns == kept
    if launcher == "submitit":
        assert (tmp_path / "other" / "submitit").stat().st_mode & 0o777 == 0o700


def family(pid):
    """A process and those that it or one of them started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended meanwhile
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def alive(pid):
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("launcher", "signalled"), [*((name, signal.SIGINT) for name in AWAY), ("joblib", signal.SIGKILL)]
)
def test_an_interrupt_leaves_nothing_running(launcher, signalled, tmp_path):
    pytest.importorskip(launcher)
    words = ["rounds=100000", "evaluation.every=100000", "seed=0,1,2", "simulation.checkpoint_s=0"]
    with (tmp_path / "log").open("w") as log:
        sweep = subprocess.Popen(
            command(launcher, tmp_path / "s", *words),
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )
    try:
        begun = "*/checkpoint.safetensors"
        until(lambda: sweep.poll() is not None or len(list((tmp_path / "s").glob(begun))) == 2, 200)
        assert sweep.poll() is None, (tmp_path / "log").read_text()
        running = family(sweep.pid)
        assert len(running) > 2
        sweep.send_signal(signalled)
        assert sweep.wait(60) == {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[signalled]
        until(lambda: not any(alive(pid) for pid in running), 60)
    finally:
        for pid in family(sweep.pid):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        sweep.wait()
