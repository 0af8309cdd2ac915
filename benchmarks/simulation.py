"""How fast the simulator trains clients, beside a plain PyTorch loop, Opacus and the simulators of others.

    python -m benchmarks.simulation [--quick] [--json] [--peers DIR] [--blazefl DIR] [--ray DIR]
                                    [averaging] [private] [clock] [clipping]

    averaging   pfl-research's CIFAR-10 shape: 50 clients of 50 points, batches of 10, one epoch, SGD 0.1, plain averaging
    private     record-level DP-SGD with noise: tabular, 50 clients of 40 rows; a small CNN, 20 clients of 40 images
    clock       the first shape by the clock, on all cores, beside the simulators of others, each in several ways
    clipping    what clipping every example's gradient costs: the same run without it, noise apart

Figures are of one round, from data at rest to the next model, without evaluation. Those of ``clock`` are seconds by the
clock, and want a quiet machine; the others are processor seconds of one thread, and all sides take turns. The median is
followed by the least and the greatest. ``--peers DIR`` is a virtual environment that has torch and pfl; it is made there
if there is none (`pip install torch pfl==0.6.0`). So are those of ``--blazefl DIR`` (`blazefl[contrib,reproducibility]`,
by a Python from 3.12 on; threads are what it is made for, and a build without the GIL is what they want) and of
``--ray DIR`` (`flwr[simulation]==1.41.*`).
"""

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from benchmarks.simulation_peers import blazefl, flower, peer, pfl, younger
from benchmarks.simulation_world import Run, World
from fedtailor.simulations.hardware import keep_pages

Times = dict[str, list[float]]


class Peers(NamedTuple):
    """The interpreters that have the simulators of others."""

    pfl: Path | None = None
    blazefl: Path | None = None
    ray: Path | None = None


def in_turns(sides: dict[str, Run], repetitions: int, elsewhere: Callable[[], list[float]] | None = None) -> Times:
    """Processor seconds of a round of each side, the sides taking turns; a turn lasts a tenth of a second or more."""
    often, found = {}, {name: list[float]() for name in sides}
    for name, run in sides.items():
        run()
        often[name] = max(1, round(0.1 / max(_seconds(run, 1), 1e-4)))
    if elsewhere is not None:
        found["pfl-research"] = []
    for _ in range(repetitions):
        for name, run in sides.items():
            found[name].append(_seconds(run, often[name]))
        if elsewhere is not None:
            found["pfl-research"].append(median(elsewhere()))
    return found


def _seconds(run: Run, times: int) -> float:
    began = time.process_time()
    for _ in range(times):
        run()
    return (time.process_time() - began) / times


def clock(repetitions: int, peers: Peers) -> dict[str, Times]:
    """By the clock, with all cores: seconds of a round."""
    found, cores = {}, os.cpu_count() or 1
    for model in ("linear", "mlp"):
        run, sides = World(model, 50, 5).ours(), dict[str, list[float]]()
        for threads in (cores, 1):
            torch.set_num_threads(threads)
            run()
            sides[f"fedtailor, threads: {threads}"] = [_elapsed(run) for _ in range(10 * repetitions)]
        rounds = 2 * repetitions
        if peers.pfl is not None:
            for threads, processes in ((cores, 1), (1, 1), (1, cores)):
                how = f"threads: {threads}" if processes == 1 else f"processes: {processes}"
                sides[f"pfl-research, {how}"] = pfl(peers.pfl, model, rounds, threads, processes, clock=True)
        if peers.blazefl is not None:
            for workers in ("none", "threads", "processes"):
                sides[f"BlazeFL, workers: {workers}"] = blazefl(peers.blazefl, model, rounds, workers)
        if peers.ray is not None:
            sides["Flower on Ray"] = flower(peers.ray, model, rounds)
            sides["Flower on Ray, clients that do nothing"] = flower(peers.ray, "nothing", rounds)
        found[f"{model}, 50 clients x 5 steps, by the clock"] = sides
    return found


def _elapsed(run: Run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def averaging(repetitions: int, peers: Peers) -> dict[str, Times]:
    found = {}
    for model in ("linear", "mlp", "tiny_cnn"):
        world = World(model, 50, 5)
        sides = {"fedtailor": world.ours(), "PyTorch loop": world.loop()}
        elsewhere = None if peers.pfl is None else partial(pfl, peers.pfl, model, 2 if model == "tiny_cnn" else 5)
        found[f"{model}, 50 clients x 5 steps"] = in_turns(sides, repetitions, elsewhere)
    return found


def private(repetitions: int, peers: Peers) -> dict[str, Times]:
    found = {}
    for model, clients in (("tabular", 50), ("small_cnn", 20)):
        world = World(model, clients, 4)
        sides = {
            "fedtailor": world.ours(1.0, 1.0),
            "fedtailor, vmap": world.ours(1.0, 1.0, "vmap"),
            "Opacus, one module": world.opacus(1.0, 1.0, anew=False),
            "Opacus, a module a client": world.opacus(1.0, 1.0, anew=True),
        }
        if model == "tabular":  # small, so that its steps are mostly overhead
            run = world.ours(1.0, 1.0, steps="compiled")
            sides[f"fedtailor, compiled in {_elapsed(run):.0f} s"] = run
        found[f"{model}, {clients} clients x 4 steps, DP-SGD"] = in_turns(sides, repetitions)
    return found


def clipping(repetitions: int, peers: Peers) -> dict[str, Times]:
    found = {}
    for model, clients in (("tabular", 50), ("mlp", 20), ("lora", 20), ("small_cnn", 20)):
        world = World(model, clients, 4)
        sides = {"fedtailor, clipped": world.ours(1.0), "without": world.ours()}
        found[f"{model}, {clients} clients x 4 steps, clipping"] = in_turns(sides, repetitions)
    return found


PARTS = {"averaging": averaging, "private": private, "clock": clock, "clipping": clipping}


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--quick", action="store_true", help="three repetitions, not seven")
    parser.add_argument("--json", action="store_true", help="all figures as one line")
    parser.add_argument("--peers", type=Path, help="where pfl-research is, or is to be installed")
    parser.add_argument("--blazefl", type=Path, help="where BlazeFL is, or is to be installed")
    parser.add_argument("--ray", type=Path, help="where Flower with Ray is, or is to be installed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_pages()  # as every simulation does
    warnings.filterwarnings("ignore", "Full backward hook", UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    blaze = arguments.blazefl
    if blaze is not None and not (blaze / "bin" / "python").exists():
        peer(blaze, "blazefl[contrib,reproducibility]", python=younger())
    peers = Peers(
        None if arguments.peers is None else peer(arguments.peers, "pfl==0.6.0"),
        None if blaze is None else blaze / "bin" / "python",
        None if arguments.ray is None else peer(arguments.ray, "flwr[simulation]==1.41.*"),
    )
    found: dict[str, Times] = {}
    for part in arguments.parts or PARTS:
        found |= PARTS[part](3 if arguments.quick else 7, peers)
    if arguments.json:
        print(json.dumps(found))
        return
    print("| ms a round, of a processor or by the clock: median (least to greatest) | side | ms | times the first |")
    print("|---|---|---:|---:|")
    for what, sides in found.items():
        first = median(next(iter(sides.values())))
        for side, seconds in sides.items():
            ms = f"{1e3 * median(seconds):.1f} ({1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f})"
            print(f"| {what} | {side} | {ms} | {median(seconds) / first:.2f} |")


if __name__ == "__main__":
    main()
