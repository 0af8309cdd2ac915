"""Workers that Ray places: they give what one process gives, speak no pickle, and leave nothing behind."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from fedtailor import tree
from fedtailor.cli.demo import free_port
from fedtailor.config import Simulation, load
from fedtailor.errors import ConfigError, ConnectionFailed, FedtailorError
from fedtailor.recipe import Part
from fedtailor.simulations import composed
from fedtailor.simulations.cohort import rows_of
from fedtailor.simulations.crew import Died, Duty, checked, receive, send, served
from fedtailor.simulations.ray_crew import Worker, installed, ray_crew
from fedtailor.simulations.ray_driver import agree, frame
from fedtailor.simulations.run import simulate
from fedtailor.simulations.setting import prepare

QUIET = {"evaluation": {"baseline": False}}
HOW = {"block": 64, "path": "auto", "policies": None, "step_s": None, "population": None}
DUTY = Duty("{}", None, "block", 64, False, True, 1, "cpu", False, "float32", "plain")
ROWS = Part(torch.zeros(1, 1), torch.zeros(1))


def by_ray(test):
    """What starts a Ray: `make test-slow` installs it."""
    without = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install -e '.[ray]'")
    return pytest.mark.slow(pytest.mark.timeout(900)(without(test)))


def equal(one, other):
    assert one and one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


def of_session(leader):
    """Processes of a session, by their command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and os.getsid(int(entry.name)) == leader:
                found[int(entry.name)] = (entry / "cmdline").read_bytes().split(b"\0")[0].decode()
        except OSError:
            continue
    return found


def framed(what, said):
    pipe = BytesIO()
    send(pipe, what, said)
    return pipe.getvalue()


def drivers(of):
    """The processes that speak to Ray for another one."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and f"\nPPid:\t{of}\n" in (entry / "status").read_text():
                found += [int(entry.name)] if b"ray_driver" in (entry / "cmdline").read_bytes() else []
        except OSError:
            continue
    return found


def workers(driver):
    return [pid for pid, name in of_session(driver).items() if name.startswith("ray::Worker")]


def until(true, seconds=60.0):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.1)
    assert true()


def test_without_ray_it_says_what_to_install(plan, sources, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("nothing is started"))
    with pytest.raises(ConfigError, match=r"simulation.ray: Ray is not installed; pip install 'fedtailor\[ray\]'"):
        simulate(plan(**QUIET), sources, ray="local")


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "10.0.0.1", "local "])
def test_an_address_of_another_kind_is_refused(address, monkeypatch):
    monkeypatch.setattr("fedtailor.simulations.ray_crew.find_spec", lambda name: name)
    with pytest.raises(ConfigError, match=r"is none of local, auto and HOST:PORT.*ray://… pickles"):
        with ray_crew(2, DUTY, ROWS, address):
            pass


def test_settings_reach_the_workers(monkeypatch):
    told = []

    def noted(plan, sources, **how):
        told.append((how["workers"], how["ray"], how["gpus"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(composed, "run_study", noted)
    words = ["study=heart", "simulation.workers=3", "simulation.ray=10.0.0.1:6379", "simulation.gpus=0.5"]
    with pytest.raises(KeyboardInterrupt):
        composed.run(load(words))
    assert told == [(3, "10.0.0.1:6379", 0.5)]
    with pytest.raises(ValidationError, match="gpus: Ray deals them out; give ray=local"):
        Simulation.model_validate({"data": {"_target_": "x"}, "gpus": 1.0})


def test_a_worker_is_told_bytes_and_answers_with_bytes(plan, sources):
    study = prepare(plan(**QUIET), sources, **HOW, on_event=lambda event: None)
    duty, rows, worker = study.duty(1), rows_of(study.data), Worker()
    at, fed = study.begin(), study.clients.fed(0, [0, 1, 2])
    told = {"cast": study.strategy.broadcast(at.state), "batches": fed.batches, "live": fed.live, "counts": fed.counts}
    first = framed({"x": rows.x, "y": rows.y}, duty._asdict())
    assert frame(BytesIO(first + b"the next one")) == first
    assert checked(*receive(BytesIO(worker.begin(first)))) == {}
    found = checked(*receive(BytesIO(worker.round(framed(told, {})))))
    equal(tree.flatten(found), tree.flatten(served(duty, rows)(told)))
    unknown = duty._replace(plan=duty.plan.replace("strategies.fedavg", "strategies.nothing"))
    with pytest.raises(ConfigError, match="no such factory"):
        checked(*receive(BytesIO(worker.begin(framed({"x": rows.x, "y": rows.y}, unknown._asdict())))))


def test_machines_with_other_software_are_refused():
    agree([installed(), installed()])
    with pytest.raises(
        ConfigError, match=f"has fedtailor 0.0.9 with torch 2, this one {installed()}; install the same"
    ):
        agree([installed(), "fedtailor 0.0.9 with torch 2"])


@by_ray
@pytest.mark.parametrize(
    ("workers", "fields"),
    [
        (1, {}),
        (2, {"strategy": {"_target_": "fedtailor.strategies.scaffold", "population": 3}}),
        (2, {"privacy": {"epsilon": 3.0, "delta": 1e-4, "clip": 1.0}}),
    ],
    ids=["one, a sum", "two, memories", "two, record-level"],
)
def test_one_or_two_give_what_a_process_gives(plan, sources, workers, fields):
    made = plan(**QUIET, **fields)
    equal(simulate(made, sources)[1], simulate(made, sources, workers=workers, ray="local")[1])


@by_ray
def test_a_worker_that_is_killed_ends_the_run_which_goes_on_from_its_checkpoint(plan, sources, tmp_path):
    at = {"checkpoint": tmp_path / "checkpoint", "every_s": 0.0, "workers": 2}
    whole = simulate(plan(**QUIET), sources, workers=2)[1]

    def kill(event):
        if event["kind"] == "round" and event["round"] == 2:
            os.kill(workers(drivers(os.getpid())[0])[1], signal.SIGKILL)

    with pytest.raises(
        Died, match=r"a worker of simulation.ray is gone \(ActorDiedError.*take fewer simulation.workers"
    ):
        simulate(plan(**QUIET), sources, **at, ray="local", on_event=kill)
    with pytest.raises(ConfigError, match="other settings"):
        simulate(plan(**QUIET), sources, **at, resume=True)
    again = simulate(plan(**QUIET), sources, **at, ray="local", resume=True)[1]
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@by_ray
def test_a_ray_of_its_own_is_alone_and_leaves_nothing(plan, sources, monkeypatch):
    short = tempfile.mkdtemp(prefix="t-")  # a socket's name has 107 letters
    monkeypatch.setenv("TMPDIR", short)
    study = prepare(plan(**QUIET), sources, **HOW, on_event=lambda event: None)
    at, fed = study.begin(), study.clients.fed(0, [0, 1, 2])
    cast, given = study.strategy.broadcast(at.state), (at.memory, fed.batches, fed.live, fed.counts)
    with pytest.raises(FedtailorError, match="KeyError: 'layers.head.weight'"):
        with ray_crew(2, study.duty(1), rows_of(study.data), "local") as running:
            driver = running.processes[0].pid
            assert running.many(cast, *given)
            there = of_session(driver)
            assert len(workers(driver)) == 2 and any(name.endswith("gcs_server") for name in there.values())
            assert listening(there) == {"127.0.0.1"}
            for pid in workers(driver):
                said = dict(item.split(b"=", 1) for item in environment(pid) if b"=" in item)
                assert said[b"RAY_USAGE_STATS_ENABLED"] == b"0" and said[b"RAY_AUTH_MODE"] == b"token"
            assert [folder.stat().st_mode & 0o777 for folder in Path(short).glob("ray-*")] == [0o700]
            assert list(Path(short).glob("ray-*/r/session_*/sockets")), "what Ray opens to everybody lies in it"
            running.many({"params": {"layers.head.bias": torch.zeros(1)}}, *given)
    assert running.processes[0].returncode == 0 and not list(Path(short).glob("ray-*"))
    until(lambda: not of_session(driver))
    shutil.rmtree(short)


@by_ray
def test_it_ends_with_a_process_that_is_killed(tmp_path):
    words = "simulation.ray=local simulation.workers=2 rounds=100000 privacy=none evaluation.baseline=false"
    command = [
        sys.executable,
        "-m",
        "fedtailor",
        "simulate",
        "study=heart",
        *words.split(),
        "simulation.checkpoint_s=0",
    ]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "run")], stderr=subprocess.DEVNULL)
    try:
        until(lambda: (tmp_path / "run" / "checkpoint.safetensors").exists(), 300)
        (driver,) = drivers(process.pid)
        assert workers(driver)
    finally:
        process.kill()
        process.wait()
    until(lambda: not of_session(driver))


@by_ray
def test_a_cluster_is_left_as_it_was(plan, sources, monkeypatch):
    for name, value in {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}.items():
        monkeypatch.setenv(name, value)  # as its ports are open to others
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    port, folder, machines = free_port(), tempfile.mkdtemp(prefix="t-"), []
    made, threads = plan(**QUIET), torch.get_num_threads()
    torch.set_num_threads(1)

    def machine(*options):
        """One with a single CPU, as a person starts it."""
        ray = "from ray.scripts.scripts import main; main()"
        command = [sys.executable, "-c", ray, "start", "--block", "--num-cpus=1"]
        log = Path(folder, f"{len(machines)}.log")
        with log.open("wb") as out:
            machines.append(subprocess.Popen([*command, *options], stdout=out, stderr=out, start_new_session=True))
        until(lambda: machines[-1].poll() is not None or b"Ray runtime started" in log.read_bytes(), 200)
        assert machines[-1].poll() is None, log.read_text()

    try:
        machine("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}/r")
        machine(f"--address=127.0.0.1:{port}")
        equal(simulate(made, sources)[1], simulate(made, sources, workers=2, ray=f"127.0.0.1:{port}")[1])
        for ask in ({"workers": 3}, {"workers": 1, "gpus": 1.0}):
            with pytest.raises(ConfigError, match="there is no place for [13] that ask for 1 CPUs"):
                simulate(made, sources, ray=f"127.0.0.1:{port}", **ask)
        assert [each.poll() for each in machines] == [None, None] and answers(port)
    finally:
        torch.set_num_threads(threads)
        for each in machines:
            for pid in of_session(each.pid):
                os.kill(pid, signal.SIGKILL)
            each.wait()
        shutil.rmtree(folder, ignore_errors=True)
    with pytest.raises(ConnectionFailed, match="no Ray cluster can be joined at 127.0.0.1:.*ray start --head"):
        simulate(made, sources, ray=f"127.0.0.1:{port}")


def answers(port):
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def environment(pid):
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def listening(pids):
    """The addresses that processes listen on."""
    sockets = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                sockets.add(os.readlink(fd))
            except OSError:
                continue
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                raw = bytes.fromhex(words[1].split(":")[0])[-4:]  # of ::ffff:a.b.c.d, too
                found.add(socket.inet_ntoa(raw[::-1]))
    return found
