"""How fast the simulator trains clients, beside a plain PyTorch loop, Opacus and the simulators of others.

    python -m benchmarks.simulation [--quick] [--json] [--peers DIR] [--blazefl DIR] [--ray DIR]
                                    [averaging] [epochs] [private] [whole] [clock] [stock] [clipping]

    averaging   pfl-research's CIFAR-10 shape: 50 clients of 50 points, batches of 10, one epoch, SGD 0.1, plain averaging
    epochs      the same with five local epochs
    private     record-level DP-SGD with noise: tabular, 50 clients of 40 rows; a small CNN, 20 clients of 40 images
    whole       the former's tabular round with the drawing of its batches: Poisson samples, a quarter of a client's rows
    clock       the first shape by the clock, on all cores, beside the simulators of others, each in several ways; and once
                more, ours with simulation.steps=compiled
    stock       of the latter the perceptron beside pfl-research's quickest way and Flower as it comes, with as many turns as
                other parts have
    clipping    what clipping every example's gradient costs: the same run without it, noise apart

The 50 clients are the same in every round, as the peers' are, and each draws the order of its points anew. "Others in every
round" are four times as many clients, of whom each round has 50 in turn.

Figures are of one round, from data at rest to the next model, without evaluation. Those of ``clock`` and ``stock`` are seconds by
the clock, and want a quiet machine; the others are processor seconds of one thread. All sides take turns, and the first is
measured before and after each turn of another: a ratio is that turn's to what was around it (benchmarks/turns.py). The
median is followed by the least and the greatest. Warm-up is the two rounds that do not count, of a peer each time that
its process is started; it and the time that a compiler took are shown apart, the latter by the clock.

``--peers DIR`` is a virtual environment that has torch and pfl; it is made there if there is none (`pip install torch
pfl==0.6.0`). So are those of ``--blazefl DIR`` (`blazefl[contrib,reproducibility]`, by a Python from 3.12 on; threads are
what it is made for, and a build without the GIL is what they want) and of ``--ray DIR`` (`flwr[simulation]==1.41.*`).
"""

import argparse
import json
import os
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.machine import machine, versions
from benchmarks.simulation_peers import blazefl, flower, peer, pfl, younger
from benchmarks.simulation_world import World
from benchmarks.turns import Figures, Side, here, in_turns, plain, table
from fedtailor.simulations.hardware import keep_pages

Sets = dict[str, dict[str, Figures]]
HERE = ("fedtailor", "torch", "numpy", "opacus")  # whose versions are told
STOCK = 2  # cores that Flower gives a simulated client where it is told nothing
EPOCHS = 5
TIMES, OTHERS = 4, ", others in every round"
SLOW = 3  # turns, at most, of what takes seconds a round


class Peers(NamedTuple):
    """The interpreters that have the simulators of others."""

    pfl: Path | None = None
    blazefl: Path | None = None
    ray: Path | None = None

    def versions(self) -> dict[str, dict[str, str]]:
        """What each has."""
        names = {"pfl": ("pfl", "torch"), "blazefl": ("blazefl", "torch"), "ray": ("flwr", "ray", "torch")}
        found = {name: getattr(self, name) for name in names}
        return {name: versions(python, *names[name]) for name, python in found.items() if python is not None}


def clock(turns: int, peers: Peers) -> Sets:
    """By the clock, with all cores: seconds of a round."""
    found, cores = {}, os.cpu_count() or 1
    for model in ("linear", "mlp"):
        what, world = f"{model}, 50 clients x 5 steps, by the clock", World(model, 50, 5)
        same, others = world.ours(), World(model, 50, 5, times=TIMES).ours()
        sides = {
            f"fedtailor, threads: {threads}{name}": here(run, time.perf_counter, threads)
            for name, run in (("", same), (OTHERS, others))
            for threads in sorted({cores, 1}, reverse=True)
        }
        compiled, theirs = _compiled(world, cores), _others(model, peers, cores)
        found[what] = in_turns(sides | theirs, max(1, turns // 2))
        found[f"{what}, compiled"] = in_turns(compiled | theirs, max(1, turns // 2))
    torch.set_num_threads(1)
    return found


def stock(turns: int, peers: Peers) -> Sets:
    """By the clock, with all cores, beside what is nearest: so few sides that there is time for more turns."""
    cores = os.cpu_count() or 1
    names = (f"pfl-research, processes: {cores}", "Flower on Ray, as it comes")
    theirs = {name: side for name, side in _others("mlp", peers, cores).items() if name in names}
    found = in_turns(_compiled(World("mlp", 50, 5), cores) | theirs, turns)
    torch.set_num_threads(1)
    return {"mlp, 50 clients x 5 steps, by the clock, compiled, more turns": found}


def _compiled(world: World, cores: int) -> dict[str, Side]:
    run = world.ours(steps="compiled")
    return {f"fedtailor, threads: {cores}, compiled": here(run, time.perf_counter, cores, compiles=True)}


def _others(model: str, peers: Peers, cores: int, rounds: int = 4) -> dict[str, Side]:
    """Each of a process of its own, or several, that is started anew for every turn."""
    sides = dict[str, Side]()
    if peers.pfl is not None:
        for threads, processes in ((cores, 1), (1, 1), (1, cores)):
            how = f"threads: {threads}" if processes == 1 else f"processes: {processes}"
            turn = partial(pfl, peers.pfl, model, rounds, threads, processes, clock=True)
            sides[f"pfl-research, {how}"] = Side(turn, threads)
    if peers.blazefl is not None:
        for workers in ("none", "threads", "processes"):
            sides[f"BlazeFL, workers: {workers}"] = Side(partial(blazefl, peers.blazefl, model, rounds, workers))
    if peers.ray is not None:
        for name, each in (("as it comes", STOCK), ("a core a client", 1)):
            sides[f"Flower on Ray, {name}"] = Side(partial(flower, peers.ray, model, rounds, each))
        sides["Flower on Ray, clients that do nothing"] = Side(partial(flower, peers.ray, "nothing", rounds, STOCK))
    return sides


def averaging(turns: int, peers: Peers) -> Sets:
    """Beside a loop and pfl-research."""
    found = {}
    for model, rounds, most in (("linear", 5, turns), ("mlp", 5, turns), ("tiny_cnn", 2, turns), ("cnn", 1, SLOW)):
        world = World(model, 50, 5)
        sides = {"fedtailor": here(world.ours()), "PyTorch loop": here(world.loop())}
        if model in ("linear", "mlp"):
            sides[f"fedtailor{OTHERS}"] = here(World(model, 50, 5, times=TIMES).ours())
        if peers.pfl is not None:
            sides["pfl-research"] = Side(partial(pfl, peers.pfl, model, rounds))
        found[f"{model}, 50 clients x 5 steps"] = in_turns(sides, min(turns, most))
    return found


def epochs(turns: int, peers: Peers) -> Sets:
    """The same with several local epochs."""
    found = {}
    for model in ("linear", "mlp"):
        world = World(model, 50, 5, EPOCHS)
        sides = {"fedtailor": here(world.ours()), "PyTorch loop": here(world.loop())}
        sides[f"fedtailor{OTHERS}"] = here(World(model, 50, 5, EPOCHS, TIMES).ours())
        if peers.pfl is not None:
            sides["pfl-research"] = Side(partial(pfl, peers.pfl, model, 2, epochs=EPOCHS))
        found[f"{model}, 50 clients x {EPOCHS} epochs of 5 steps"] = in_turns(sides, turns)
    return found


def private(turns: int, peers: Peers) -> Sets:
    """Beside Opacus."""
    found = {}
    for model, clients in (("tabular", 50), ("small_cnn", 20)):
        world = World(model, clients, 4)
        sides = {
            "fedtailor": here(world.ours(1.0, 1.0)),
            "fedtailor, vmap": here(world.ours(1.0, 1.0, "vmap")),
            "Opacus, one module": here(world.opacus(1.0, 1.0, anew=False)),
            "Opacus, a module a client": here(world.opacus(1.0, 1.0, anew=True)),
        }
        if model == "tabular":  # small, so that its steps are mostly overhead
            sides["fedtailor, compiled"] = here(world.ours(1.0, 1.0, steps="compiled"), compiles=True)
        found[f"{model}, {clients} clients x 4 steps, DP-SGD"] = in_turns(sides, turns)
    return found


def whole(turns: int, peers: Peers) -> Sets:
    """Beside Opacus, both from a client's rows on, not from its batches."""
    world = World("tabular", 50, 4)
    sides = {
        "fedtailor": here(world.whole(1.0, 1.0)),
        "fedtailor, of batches of 10 that are there already": here(world.ours(1.0, 1.0)),
        "Opacus, one module": here(world.opacus(1.0, 1.0, anew=False, draws=True)),
        "Opacus, a module a client": here(world.opacus(1.0, 1.0, anew=True, draws=True)),
    }
    return {"tabular, 50 clients x 4 steps, DP-SGD, drawing included": in_turns(sides, turns)}


def clipping(turns: int, peers: Peers) -> Sets:
    """With clipping, as a multiple of without."""
    found = {}
    for model, clients in (("tabular", 50), ("mlp", 20), ("lora", 20), ("small_cnn", 20)):
        world = World(model, clients, 4)
        sides = {"without clipping": here(world.ours()), "with clipping": here(world.ours(1.0))}
        found[f"{model}, {clients} clients x 4 steps"] = in_turns(sides, turns)
    return found


PARTS = {
    "averaging": averaging,
    "epochs": epochs,
    "private": private,
    "whole": whole,
    "clock": clock,
    "stock": stock,
    "clipping": clipping,
}


def surroundings(peers: Peers) -> dict[str, dict[str, Any]]:
    """What figures depend on, beside the threads, which each side has of its own."""
    return {"machine": machine(), "versions": versions(sys.executable, *HERE)} | peers.versions()


def _peers(arguments: argparse.Namespace) -> Peers:
    blaze = arguments.blazefl
    if blaze is not None and not (blaze / "bin" / "python").exists():
        peer(blaze, "blazefl[contrib,reproducibility]", python=younger())
    return Peers(
        None if arguments.peers is None else peer(arguments.peers, "pfl==0.6.0"),
        None if blaze is None else blaze / "bin" / "python",
        None if arguments.ray is None else peer(arguments.ray, "flwr[simulation]==1.41.*"),
    )


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--quick", action="store_true", help="three turns, not seven; of clock one, not three")
    parser.add_argument("--json", action="store_true", help="all figures as one line")
    parser.add_argument("--peers", type=Path, help="where pfl-research is, or is to be installed")
    parser.add_argument("--blazefl", type=Path, help="where BlazeFL is, or is to be installed")
    parser.add_argument("--ray", type=Path, help="where Flower with Ray is, or is to be installed")
    arguments = parser.parse_args()
    keep_pages()  # as every simulation does
    warnings.filterwarnings("ignore", "Full backward hook", UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    peers, found = _peers(arguments), Sets()
    around = surroundings(peers)
    for part in arguments.parts or PARTS:
        torch.set_num_threads(1)
        found |= PARTS[part](3 if arguments.quick else 7, peers)
    if arguments.json:
        print(json.dumps(around | {"figures": plain(found)}))
        return
    for name, told in around.items():
        print(f"{name}: {', '.join(f'{key} {value}' for key, value in told.items())}")
    print(f"\n{table(found)}")


if __name__ == "__main__":
    main()
