"""The other side of benchmarks/simulation.py: simulators by others, each run by an interpreter that has it."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.turns import Rounds

SETTLES = 2.0  # seconds for what a peer's processes leave to do when they end: it would slow the side that is next
PYTHONS = ("python3.14t", "python3.14", "python3.13", "python3.12")  # that BlazeFL runs on, the best for it first


def peer(folder: Path, *packages: str, python: str = sys.executable) -> Path:
    """The interpreter of a virtual environment with torch and ``packages``, made if there is none."""
    inside = folder / "bin" / "python"
    if not inside.exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
        here = f"torch=={torch.__version__.split('+')[0]}"
        for some in ([here], packages):
            subprocess.run([inside, "-m", "pip", "install", "--quiet", *some], check=True)
    return inside


def younger() -> str:
    """An interpreter that BlazeFL runs on.

    Raises:
        SystemExit: if there is none.
    """
    for name in PYTHONS:
        found = shutil.which(name)
        if found and subprocess.run([found, "--version"], capture_output=True).returncode == 0:
            return found
    raise SystemExit(f"--blazefl: it needs one of {', '.join(PYTHONS)} on PATH, to make its environment with")


def pfl(
    python: Path, model: str, rounds: int, threads: int = 1, processes: int = 1, clock: bool = False, epochs: int = 1
) -> Rounds:
    """Seconds of some rounds by pfl-research, of its processor or by the clock."""
    script = Path(__file__).with_name("pfl_peer.py")
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [python, *several, script, model, str(rounds), "clock" if clock else "processor", str(epochs)]
    return _said(command, {"OMP_NUM_THREADS": str(threads)})


def flower(python: Path, model: str, rounds: int, cores: int) -> Rounds:
    """Seconds of some rounds by Flower's simulation on Ray, by the clock; ``cores`` are one client's."""
    return _said([python, Path(__file__).with_name("ray_peer.py"), model, str(rounds), str(cores)])


def blazefl(python: Path, model: str, rounds: int, workers: str) -> Rounds:
    """Seconds of some rounds by BlazeFL, by the clock; ``workers`` are threads or processes, one a core, or none."""
    return _said([python, Path(__file__).with_name("blaze_peer.py"), model, str(rounds), workers])


def _said(command: list[Path | str], more: dict[str, str] | None = None) -> Rounds:
    for _ in range(2):  # one of several hundred starts of processes that look for each other has been seen to fail
        run = subprocess.run(command, capture_output=True, text=True, env=os.environ | (more or {}))
        if not run.returncode:
            break
    else:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {run.returncode}:\n{run.stderr[-2000:]}")
    time.sleep(SETTLES)
    return Rounds(**json.loads(run.stdout.splitlines()[-1]))
