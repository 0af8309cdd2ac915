"""``simulation.engine=flower``: the same study on Flower's own simulation runtime, for parity with what a deployment does.

Flower's runtime changes the process that it runs in (its environment, its loggers, its Ray), waits for its threads
after Ctrl-C and leaves Ray's processes to whoever started them. It therefore gets a process of its own, fedtailor.cli.virtual_nodes,
which speaks JSON lines and ends with this one, however this one ends. See docs/adr/0019-flower-engine.md.
"""

import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fedtailor import store
from fedtailor.config import Simulation, build
from fedtailor.errors import ConfigError, ConnectionFailed, ContractError, FedtailorError, RefusedError, StoreError
from fedtailor.recipe import Recipe
from fedtailor.result import Result
from fedtailor.simulations.cohort import prepared, with_rows
from fedtailor.simulations.setting import OnEvent
from fedtailor.study import Plan
from fedtailor.tree import Params

NAME = "flower simulation"  # in a result
RAISED = (ConfigError, RefusedError, ContractError, StoreError, ConnectionFailed)
WORDS = 500  # of an error, at most, in letters


class Ended(FedtailorError):
    """Flower's runtime ended without a result."""

    code = "flower"


def simulate(plan: Plan, simulation: Simulation, on_event: OnEvent = lambda event: None) -> tuple[Result, Params]:
    """Run ``plan`` with our ServerApp and ClientApp on virtual nodes of Flower's runtime, one a site.

    Without privacy the parameters equal the block engine's and the deployment's to floating-point tolerance. With
    privacy, noise and samples are those of a site and of a coordinator: secret, and others in every run. No site's
    policy, ledger or airlock takes part.

    Args:
        plan: with privacy resolved. Its ``deadline_s`` is not applied: as in the block engine, rounds wait for all.
        simulation: ``workers`` is the number of Ray's actors, each with ``threads`` threads, or one.

    Raises:
        ConfigError: naming what this engine cannot do, or that Ray is not installed; code ``quorum``, if sites fail.
        ContractError: if data do not satisfy the contract.
        Ended: if the runtime ended without a result.
    """
    check(plan, simulation)
    data = prepared(plan, build(plan.recipe, Recipe), build(simulation.data, dict))
    if empty := [entry["site"] for entry in with_rows(plan, data)[1]]:
        raise ConfigError(
            f"sites: {', '.join(empty)} have no row to train on; leave them out, or simulation.engine=block"
        )
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="flower-", dir=_short(), ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        asked = {"plan": plan, "simulation": simulation}
        told = {name: part.model_dump(mode="json", by_alias=True) for name, part in asked.items()}
        store.write_json(folder / "experiment.json", told)
        with _process(folder, simulation.threads) as process:
            done = _followed(process, on_event)
        if not done:
            said = _last_line((folder / "log").read_text(errors="replace"))
            raise Ended(f"Flower's simulation runtime ended with code {process.returncode}: {said}")
        result = Result.model_validate_json((folder / "result.json").read_text())
        params = load_file(folder / "model.safetensors")
    wall_s = time.monotonic() - began
    setup_s = result.timing.setup_s + wall_s - result.timing.wall_s  # the process, Ray and its end too
    timing = result.timing.model_copy(update={"wall_s": wall_s, "setup_s": setup_s})
    versions = result.versions | {"ray": version("ray")}
    return result.model_copy(update={"engine": NAME, "timing": timing, "versions": versions}), params


def check(plan: Plan, simulation: Simulation) -> None:
    """Refuse what this engine cannot do.

    Raises:
        ConfigError: naming the setting and the way out.
    """
    refused = {
        "population": (simulation.population is not None, "its nodes are the plan's sites", "population=none"),
        "simulation.policy": (simulation.policy is not None, "its nodes ask nobody's rules", "simulation.policy=null"),
        "simulation.step_s": (simulation.step_s, "it has no virtual clock", "simulation.step_s={}"),
        "simulation.device": (
            simulation.device not in ("cpu", "auto"),
            "its nodes train as sites do",
            "simulation.device=cpu",
        ),
        "simulation.precision": (
            simulation.precision != "float32",
            "its nodes train as sites do",
            "simulation.precision=float32",
        ),
        "simulation.ray": (simulation.ray is not None, "it starts a Ray of its own", "simulation.ray=null"),
        "buffer": (plan.buffer is not None, "its rounds wait for all sites", "buffer=null"),
        "local.within_s": (
            plan.local.within_s is not None,
            "its nodes share this machine, whose clock says nothing of theirs",
            "local.within_s=null",
        ),
    }
    for setting, (given, why, instead) in refused.items():
        if given:
            raise ConfigError(
                f"{setting}: not with simulation.engine=flower, {why}; {instead}, or simulation.engine=block"
            )
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "simulation.engine=flower: Ray is not installed; pip install 'fedtailor[ray]', or simulation.engine=block"
        )


def _short() -> str:
    """The temporary folder, or /tmp where its name is too long: a Unix socket's path, and Ray's is 85, has 107 bytes at most."""
    found = tempfile.gettempdir()
    return found if len(found.encode()) <= 20 else "/tmp"


@contextmanager
def _process(scratch: Path, threads: int | None) -> Iterator[subprocess.Popen[bytes]]:
    """Start the runtime's process. What it and Ray write lies in ``scratch``; both end with the context.

    It is first in a session of its own, with Ray's processes, which would not all end with it: no Ctrl-C reaches them, and
    all are killed at once.
    """
    environment = os.environ | {
        "TMPDIR": str(scratch),
        "FLWR_HOME": str(scratch / "flwr"),  # else ~/.flwr
        "RAY_AUTH_MODE": "token",  # else whoever has an account on this machine could run code as this one
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux too: it listens on loopback only
        "OMP_NUM_THREADS": str(threads or 1),
    }
    command = [sys.executable, "-P", "-m", "fedtailor.cli.virtual_nodes", str(scratch)]
    with (scratch / "log").open("wb") as log, ExitStack() as ends:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # it ends when this closes
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        ends.enter_context(process)  # closes its pipes
        ends.callback(process.wait)
        ends.callback(os.killpg, process.pid, signal.SIGKILL)  # first, while nobody else can have its number
        yield process


def _followed(process: subprocess.Popen[bytes], on_event: OnEvent) -> bool:
    """Follow the process to its end; whether its result is there."""
    assert process.stdout is not None
    failed = ""
    for line in process.stdout:
        event: dict[str, Any] = json.loads(line)
        if event["kind"] == "done":
            return True
        if event["kind"] == "failed":
            failed = f"; {event['site']}: {_last_line(event['why'])}"
        if event["kind"] == "error":
            kind = next((kind for kind in RAISED if kind.__name__ == event["type"]), Ended)
            raise kind(event["text"] + failed, code=event["code"])
        on_event(event)
    return False


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][-WORDS:] if lines else "it said nothing"
