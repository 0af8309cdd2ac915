"""A real deployment on loopback: the installed command, real processes, real TLS."""

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from fedtailor import control
from fedtailor.cli.demo import free_port
from fedtailor.cli.rehearsal import admit
from fedtailor.client.connection import tls
from fedtailor.client.joining import Settings
from fedtailor.config import load
from fedtailor.datasets import heart_disease, write_csv
from fedtailor.errors import ConnectionFailed
from fedtailor.privacy.planning import resolve
from fedtailor.server.enrolment import Gate, gated
from fedtailor.server.home import Home, ServerConfig
from fedtailor.server.listener import Bell, public, serve, wait_until_started
from fedtailor.server.renewal import keep_renewed
from fedtailor.server.superlink import SuperLink
from fedtailor.study import Plan

torch.set_num_threads(1)


class Deployment:
    """A coordinator and sites, as processes that a test may kill."""

    def __init__(self, folder: Path, sites: tuple[str, ...], epsilon: float = 1000.0) -> None:
        self.folder, self.sites = folder, sites
        self.server_home = folder / "server"
        self.port = free_port()
        home = Home(self.server_home)
        home.init(ServerConfig(name="test", port=self.port, hosts=("127.0.0.1", "localhost")))
        sources = heart_disease()
        for site in sites:
            data = folder / f"{site}.csv"
            write_csv(sources[site].table(), data)
            admit(home, site, self.site_home(site), Settings(data, ["heart"], epsilon, 1e-4))
            path = self.site_home(site) / "site.yaml"
            path.write_text(
                path.read_text().replace("policy:\n", "policy:\n  without_privacy: true\n  approval: policy\n")
            )
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def site_home(self, site: str) -> Path:
        return self.folder / "sites" / site

    def start(self, name: str) -> None:
        home = ["server", "up", "--home", str(self.server_home)] if name == "server" else []
        arguments = home or ["client", "up", "--home", str(self.site_home(name))]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "fedtailor", *arguments],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"NO_PROXY": "127.0.0.1,localhost"},
                cwd=self.folder,
                start_new_session=True,
            )

    def start_all(self) -> None:
        for name in ("server", *self.sites):
            self.start(name)
        self.until(lambda: all(self.ask("Status")["sites"].get(site) for site in self.sites), 120, "all sites connect")

    def ask(self, method: str, **request: Any) -> dict[str, Any]:
        return control.call(control.socket_of(self.server_home), "Server", method, request)

    def ask_site(self, site: str, method: str) -> dict[str, Any]:
        return control.call(control.socket_of(self.site_home(site)), "Site", method)

    def plan(self, *overrides: str) -> Plan:
        sites = f"sites=[{','.join(self.sites)}]"
        quorum = f"quorum={len(self.sites)}"
        return resolve(load(["study=heart", sites, quorum, "deadline_s=60", *overrides]).plan)

    def submit(self, plan: Plan) -> str:
        return str(self.ask("Submit", plan=plan.canonical(), config="")["run"])

    def status(self, run: str) -> dict[str, Any]:
        return next(r for r in self.ask("Runs")["runs"] if r["run"] == run)

    def finish(self, run: str, timeout: float = 120) -> dict[str, Any]:
        """Wait until a run has ended; its result."""
        self.until(lambda: self.status(run)["status"] in ("completed", "stopped", "failed"), timeout, f"{run} ends")
        status = self.status(run)
        assert status["status"] == "completed", status["detail"]
        return dict(json.loads((self.run_folder(run) / "result.json").read_text()))

    def run_folder(self, run: str) -> Path:
        return self.server_home / "studies" / run

    def kill(self, name: str) -> None:
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait()

    def until(self, condition: Callable[[], Any], timeout: float, what: str, pause: float = 0.1) -> None:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            try:
                if condition():
                    return
            except (ConnectionFailed, FileNotFoundError):
                pass
            time.sleep(pause)
        logs = "\n".join(f"== {p.name}\n{p.read_text(errors='replace')[-1500:]}" for p in self.folder.glob("*.log"))
        raise AssertionError(f"not within {timeout} s: {what}\n{logs}")

    def stop(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Hub:
    """A coordinator's public port in this process: real TLS, the gate, and Flower's SuperLink behind it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, Home(folder / "hub")
        self.home.init(ServerConfig(name="test", hosts=("127.0.0.1", "localhost")))
        self.link = SuperLink(folder / "flower.db", folder / "transit")
        self.gate = Gate(self.home, self.link.admit)
        app = gated(public(self.link.app, Bell(), patience=0.0), self.gate)
        self.server = serve(app, "127.0.0.1", 0, self.home.tls, functools.partial(keep_renewed, self.home))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        assert wait_until_started(self.server)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        config = self.home.folder / "server.yaml"
        config.write_text(config.read_text().replace("port: 8443", f"port: {port}"))

    def settings(self) -> Settings:
        (self.folder / "data.csv").touch()
        return Settings(self.folder / "data.csv", ["heart"], 3.0, 1e-4)

    def admit(self, site: str) -> Path:
        """Admit a site; the folder of its keys."""
        admit(self.home, site, self.folder / site, self.settings())
        return self.folder / site / "keys"

    def client(self, keys: Path, stem: str = "site") -> httpx.Client:
        context = tls(keys / "ca.pem", keys / f"{stem}.pem", keys / f"{stem}.key")
        return httpx.Client(base_url=f"https://{self.address}", verify=context, trust_env=False)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A coordinator's public port in this process."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = Hub(tmp_path)
    yield made
    made.stop()


@pytest.fixture(scope="session")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two hospitals and a coordinator, running: one for all tests, each of which leaves it running."""
    made = Deployment(tmp_path_factory.mktemp("deployment"), ("cleveland", "va"))
    try:
        made.start_all()
        yield made
    finally:
        made.stop()


def laid_out(folder: Path) -> Iterator[Callable[..., Deployment]]:
    made: list[Deployment] = []

    def make(*sites: str) -> Deployment:
        made.append(Deployment(folder, sites))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture
def lay_out(tmp_path: Path) -> Iterator[Callable[..., Deployment]]:
    """Make a deployment of a test's own, nothing of it started; what the test starts is stopped."""
    yield from laid_out(tmp_path)


@pytest.fixture(scope="module")
def lay_out_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Deployment]]:
    """The same, for all tests of a module."""
    yield from laid_out(tmp_path_factory.mktemp("module"))
