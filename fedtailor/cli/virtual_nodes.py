"""The process of ``simulation.engine=flower``: Flower's simulation runtime around our ServerApp and ClientApp.

Started by fedtailor.simulations.flower_engine, never by a person. The folder it is given holds ``experiment.json`` and gets
``result.json`` and ``model.safetensors``; each event is a line of JSON. It stands here because only this floor may know
the server and the client.
"""

import json
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from fedtailor import store
from fedtailor.config import Experiment, Simulation
from fedtailor.errors import FedtailorError
from fedtailor.study import Plan


def main() -> None:
    """Run one simulation."""
    scratch = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to the log
    started_by = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    threading.Thread(target=_end_with, args=(started_by, scratch), daemon=True).start()

    def say(event: dict[str, Any]) -> None:
        answers.write(json.dumps(event) + "\n")

    try:
        said = json.loads((scratch / "experiment.json").read_text())
        plan, simulation = Plan.model_validate(said["plan"]), Simulation.model_validate(said["simulation"])
        simulated(Experiment(plan, simulation), scratch, say)
        say({"kind": "done"})
    except Exception as error:
        words = str(error) if isinstance(error, FedtailorError) else f"{type(error).__name__}: {error}"
        say({"kind": "error", "type": type(error).__name__, "code": getattr(error, "code", "flower"), "text": words})
    threading.Event().wait()  # to be killed, with what Ray may have left


def _end_with(started_by: BinaryIO, scratch: Path) -> None:
    """End this process and Ray's, all of one session, when whoever started it has ended."""
    started_by.read()
    shutil.rmtree(scratch, ignore_errors=True)  # nobody else will
    os.killpg(0, signal.SIGKILL)


def simulated(experiment: Experiment, scratch: Path, say: Callable[[dict[str, Any]], None]) -> None:
    """Run ``experiment`` on Flower's runtime, one node a site, and write what it gave."""
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from fedtailor.client.app import app as client
    from fedtailor.server.app import conduct

    plan, simulation = experiment
    outcome: list[Any] = []
    server = ServerApp()

    @server.main()
    def conducted(grid: Grid, context: Context) -> None:
        try:
            outcome.append(conduct(grid, plan, simulation.data, math.inf, say))
        except Exception as error:  # raised below, where it is not taken for the runtime's own
            outcome.append(error)

    run_simulation(
        server,
        client,
        len(plan.sites),
        backend_config={
            "init_args": {
                "num_cpus": simulation.workers,
                "num_gpus": 0,
                "include_dashboard": False,
                "log_to_driver": False,
                "configure_logging": False,
                "_temp_dir": str(scratch / "ray"),
            },
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    (found,) = outcome
    if isinstance(found, Exception):
        raise found
    result, params = found
    store.write_pieces(scratch / "model.safetensors", store.safetensors(params))
    store.write_text(scratch / "result.json", result.model_dump_json(by_alias=True))


if __name__ == "__main__":
    main()
