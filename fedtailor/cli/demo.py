"""``fedtailor demo``: a coordinator and four hospitals as real processes on loopback, by the very same commands."""

import ctypes
import json as jsonlib
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fedtailor.cli.options import Json, show
from fedtailor.cli.server import ask
from fedtailor.errors import ConfigError, ConnectionFailed, FedtailorError

MARKER = ".fedtailor-demo"
Overrides = Annotated[list[str] | None, typer.Argument(help="Hydra overrides of the study: privacy=none rounds=5 …")]
Out = Annotated[
    Path, typer.Option(help="Where the demo's folders and the result go; an earlier demo there is replaced.")
]


class Processes:
    """Child processes that end with this one, whatever happens."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.interrupted = False

    def __enter__(self) -> "Processes":
        self.before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def _interrupt(self, *_: object) -> None:
        self.interrupted = True  # the exception alone is lost where it meets a library's callback
        raise KeyboardInterrupt

    def start(self, name: str, *arguments: str) -> None:
        """Start ``fedtailor …`` in the background, with its log in ``logs``."""
        with (self.logs / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", "fedtailor", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches this process only, which then ends them in order
                preexec_fn=_die_with_parent,
            )

    def check(self) -> None:
        """Raise if one of them ended by itself, or Ctrl-C was pressed."""
        if self.interrupted:
            raise KeyboardInterrupt
        for name, process in self.running.items():
            if process.poll() is not None:
                path = self.logs / f"{name}.log"
                last = (path.read_text(errors="replace").strip().splitlines() or ["(no output)"])[-1]
                raise FedtailorError(f"{name} ended with code {process.returncode}: {last}; its log is {path}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self.before)
        for process in self.running.values():
            if process.poll() is None:
                process.terminate()
        end = time.monotonic() + 10
        for process in self.running.values():
            try:
                process.wait(timeout=max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def demo(overrides: Overrides = None, out: Out = Path("outputs/demo"), json: Json = False) -> None:
    """Four hospitals tailor a heart-disease model under differential privacy, over a real deployment."""
    from fedtailor.config import load
    from fedtailor.report import console_table
    from fedtailor.result import Result

    began = time.monotonic()
    console = Console(stderr=True)
    plan = load(["study=heart", *(overrides or [])]).plan
    folder = _fresh(out)
    os.environ |= {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}  # children inherit it
    with Processes(folder / "logs") as processes:
        with console.status("starting one coordinator; four hospitals join it, each with a key of its own"):
            _server(folder)
            processes.start("server", "server", "up", "--home", str(folder / "server"))
            for site in _joined(folder, plan, _data(folder, plan.sites), processes):
                processes.start(site, "client", "up", "--home", str(folder / "sites" / site))
            connected = "not all hospitals connected"
            _until(lambda: all(ask(folder / "server", "Status")["sites"].values()), processes, connected)
        console.print(f"{len(plan.sites)} hospitals connected over mutual TLS after {time.monotonic() - began:.1f} s")
        run = _follow(folder / "server", ["study=heart", *(overrides or [])], plan.rounds, processes, console)
    produced = folder / "server" / "studies" / run
    for path in sorted(produced.iterdir()):
        if path.is_file() and path.name not in ("checkpoint.safetensors", "status.json", "plan.json"):
            shutil.copyfile(path, folder / path.name)
    result = Result.model_validate_json((folder / "result.json").read_text())
    if not show(jsonlib.loads(result.model_dump_json(by_alias=True)), json):
        Console().print(console_table(result))
        Console().print(
            f"model: {folder / 'model.safetensors'}\ncard:  {folder / 'model_card.md'}\nplot:  {folder / 'rounds.png'}"
        )
        Console().print(
            f"all of it took {time.monotonic() - began:.1f} s; everything that was started has been stopped"
        )
    if result.status != "completed":
        raise typer.Exit(1)


def _fresh(out: Path) -> Path:
    """An empty demo folder. Only a folder that an earlier demo made is ever deleted."""
    folder = out.resolve()
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise ConfigError(f"--out {folder} holds something else than an earlier demo; choose another folder")
        shutil.rmtree(folder)
    (folder / "logs").mkdir(parents=True)
    (folder / MARKER).touch()
    return folder


def free_port() -> int:
    """A port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _server(folder: Path) -> None:
    from fedtailor.server.home import Home, ServerConfig

    config = ServerConfig(name="demo", host="127.0.0.1", port=free_port(), hosts=("127.0.0.1", "localhost"))
    Home(folder / "server").init(config)


def _data(folder: Path, sites: Sequence[str]) -> dict[str, Path]:
    from fedtailor.datasets import heart_disease, write_csv

    sources, written = heart_disease(), {}
    (folder / "data").mkdir()
    for site in sites:
        if site not in sources:
            raise ConfigError(f"sites: the demo has data for {', '.join(sources)}, not for {site!r}")
        written[site] = folder / "data" / f"{site}.csv"
        write_csv(sources[site].table(), written[site])
    return written


def _joined(folder: Path, plan: Any, data: dict[str, Path], processes: Processes) -> Iterator[str]:
    """Invite all hospitals; each joins over the network, at the same time; yields each that is admitted."""
    from fedtailor.server import roster
    from fedtailor.server.home import Home

    home, ended = Home(folder / "server"), queue.Queue[tuple[str, Exception | None]]()
    up = threading.Event()

    def take_part(site: str, invitation: str) -> None:
        try:
            _join(folder / "sites" / site, invitation, plan, data[site], home, up)
            ended.put((site, None))
        except Exception as error:  # raised again below, in the main thread
            ended.put((site, error))

    for site in data:
        text = roster.invite(home, site).text()
        threading.Thread(target=take_part, args=(site, text), name=f"join {site}", daemon=True).start()
    _until(lambda: bool(ask(home.folder, "Status")["ready"]), processes, "the coordinator did not start")
    up.set()
    for _ in data:
        site, error = ended.get(timeout=120)
        processes.check()
        if error is not None:
            raise error
        yield site


def _join(folder: Path, invitation: str, plan: Any, data: Path, home: Any, up: threading.Event) -> None:
    """One hospital, and the operator's answer to it, as soon as the coordinator is up."""
    import yaml

    from fedtailor.client.joining import Joining, Settings, join
    from fedtailor.server import roster

    def compared(it: Joining) -> None:  # what two people do by telephone
        roster.approve(home, it.invitation.site, it.fingerprint)

    privacy = plan.record
    up.wait()
    settings = Settings(data, [plan.study], privacy.epsilon if privacy else 1.0, privacy.delta if privacy else 1e-4)
    join(folder, invitation, settings, say=compared)
    if privacy is None:  # the site says so itself, in its own policy
        raw = yaml.safe_load((folder / "site.yaml").read_text())
        raw["policy"]["without_privacy"] = True
        (folder / "site.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))


def _until(condition: Callable[[], bool], processes: Processes, otherwise: str, timeout: float = 120.0) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        processes.check()
        try:
            if condition():
                return
        except ConnectionFailed:
            pass  # it is still starting
        time.sleep(0.2)
    raise ConnectionFailed(f"{otherwise} within {timeout:.0f} s; the logs are in {processes.logs}")


def _approve(sites: Path, names: Sequence[str], run: str, processes: Processes, console: Console) -> None:
    """What an officer of each hospital does: look at the plan, compare it with the policy, and say yes."""
    from fedtailor.cli.client import ask

    end, left = time.monotonic() + 60, list(names)
    while left and time.monotonic() < end:
        processes.check()
        for name in list(left):
            if any(row["run"] == run for row in ask(sites / name, "Plans")["rows"]):
                shown = ask(sites / name, "Approve", {"plan": run, "who": "demo"})
                console.print(f"{name} approves plan {shown['hash'][:12]}", highlight=False)
                left.remove(name)
        time.sleep(0.1)


def _follow(home: Path, overrides: list[str], rounds: int, processes: Processes, console: Console) -> str:
    """Submit the study and show its progress until it ends; the run's name."""
    import yaml

    from fedtailor import control
    from fedtailor.config import load
    from fedtailor.leaving import agreed
    from fedtailor.privacy.planning import resolve

    plan = resolve(load(overrides).plan)
    config = yaml.safe_dump(plan.model_dump(mode="json", by_alias=True), sort_keys=False)
    leaves = agreed(plan.canonical()).model_dump_json()
    run = str(ask(home, "Submit", {"plan": plan.canonical(), "config": config, "leaves": leaves})["run"])
    _approve(home.parent / "sites", plan.sites, run, processes, console)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("round {task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("tailoring", total=rounds)
        for event in control.watch(control.socket_of(home), "Server", "Watch", {"run": run}):
            processes.check()
            if event["kind"] == "round":
                progress.update(task, completed=event["round"])
            elif event["kind"] == "reply" and event["code"]:
                progress.console.print(
                    f"{event['site']}: no reply that counts in round {event['round']} ({event['code']})"
                )
            elif event["kind"] == "finished" and event["status"] == "failed":
                raise FedtailorError(f"{run} failed: {event.get('detail')}")
    return run
