"""How fast the simulator trains clients, beside a plain PyTorch loop, pfl-research and Opacus, on one thread each.

    python -m benchmarks.simulation [--quick] [--json] [--peers DIR] [--ray DIR] [averaging] [private] [clock] [clipping]

    averaging   pfl-research's CIFAR-10 shape: 50 clients of 50 points, batches of 10, one epoch, SGD 0.1, plain averaging
    private     record-level DP-SGD with noise: tabular, 50 clients of 40 rows; a small CNN, 20 clients of 40 images
    clock       the first shape by the clock, all cores, beside stock Flower on Ray (with --ray)
    clipping    what clipping every example's gradient costs: the same run without it, noise apart

Figures are processor seconds of one round, from data at rest to the next model, without evaluation: the machine may be
shared. All sides take turns; the median of the repetitions is followed by the least and the greatest. ``--peers DIR``
is a virtual environment that has torch and pfl; it is made there if there is none (`pip install torch pfl==0.6.0`). So is
that of ``--ray DIR``, with `flwr[simulation]==1.41.*`.
"""

import argparse
import json
import os
import subprocess
import time
import venv
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.simulation_models import MODELS
from fedtailor import recipe as recipes
from fedtailor import strategies, tree
from fedtailor.config import Steps
from fedtailor.recipe import Part, Recipe
from fedtailor.simulations.compiled import replay_of
from fedtailor.simulations.engine import simulate_round
from fedtailor.simulations.feed import Feed
from fedtailor.simulations.noise import seeded
from fedtailor.simulations.paths import Round, Task, choose
from fedtailor.tree import Params

BATCH, LR = 10, 0.1
SHAPES = {"tabular": (30,), "lora": (32, 64)}  # of an example; else an image
Run = Callable[[], None]
Times = dict[str, list[float]]


class World:
    """Clients with data of their own, as a simulation has them."""

    def __init__(self, model: str, clients: int, steps: int) -> None:
        torch.manual_seed(0)
        self.make, self.clients, self.steps = MODELS[model], clients, steps
        count = clients * steps * BATCH
        self.data = Part(torch.randn(count, *SHAPES.get(model, (3, 32, 32))), torch.randint(2, (count,)))
        self.recipe = Recipe(model, None, self._model, _losses, None)  # type: ignore[arg-type]
        self.start = recipes.initial(self.recipe, 0)
        self.rows = torch.randperm(count).view(clients, steps, BATCH)

    def _model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # so that what is frozen is the same in every copy
            return self.make()

    def ours(
        self, clip: float | None = None, noise: float | None = None, path: str = "auto", steps: Steps = "plain"
    ) -> Run:
        """A round by the simulator."""
        strategy = strategies.fedavg()
        feed = Feed(self.data, None if noise is None else seeded(self.start, noise), self.start)
        batches = {
            "rows": self.rows,
            "live": torch.ones(self.rows.shape),
            "scale": torch.full((self.clients, self.steps), 1 / BATCH),
        }
        if noise is not None:
            batches["noise_seed"] = torch.randint(2**62, (self.clients,))
        live, counts = torch.ones(self.clients, self.steps), torch.full((self.clients,), float(self.steps * BATCH))
        state = strategy.init(self.start)
        replay = replay_of(steps, torch.device("cpu"), feed, print)
        task = Task(self.recipe, strategy, LR, clip, feed, 64, together=True, replay=replay)
        way = choose(path, task, Round(strategy.broadcast(state), {}, batches, live, counts))  # type: ignore[arg-type]
        return lambda: _none(simulate_round(strategy, way.many, state, {}, batches, live, counts, 0, block=way.block))

    def loop(self) -> Run:
        """A round of plain PyTorch: one module, one client after another."""

        def run() -> None:
            module, total = self._model(), tree.map(torch.zeros_like, self.start)
            for client in self.rows:
                _load(module, self.start)
                optimizer = torch.optim.SGD(module.parameters(), LR)
                for rows in client:
                    optimizer.zero_grad()
                    cross_entropy(module(self.data.x[rows]), self.data.y[rows]).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                _add(total, module, self.start)

        return run

    def opacus(self, clip: float, noise: float, anew: bool) -> Run:
        """A round of Opacus, one client after another: each with a module of its own, or all with the same."""
        kept = GradSampleModule(self._model())

        def run() -> None:
            total = tree.map(torch.zeros_like, self.start)
            for client in self.rows:
                module = GradSampleModule(self._model()) if anew else kept
                _load(module._module, self.start)
                optimizer = DPOptimizer(
                    torch.optim.SGD(module.parameters(), LR),
                    noise_multiplier=noise / clip,
                    max_grad_norm=clip,
                    expected_batch_size=BATCH,
                )
                for rows in client:
                    optimizer.zero_grad()
                    cross_entropy(module(self.data.x[rows]), self.data.y[rows]).backward()
                    optimizer.step()
                _add(total, module._module, self.start)

        return run


def _losses(outputs: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(outputs, y, reduction="none")


def _none(value: object) -> None:
    return None


def _load(module: nn.Module, params: Params) -> None:
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(params[name])


def _add(total: Params, module: nn.Module, start: Params) -> None:
    with torch.no_grad():
        for name, p in module.named_parameters():
            total[name] += p - start[name]


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


def peer(folder: Path, package: str) -> Path:
    """The interpreter of a virtual environment with torch and ``package``, made if there is none."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", f"torch=={torch.__version__.split('+')[0]}"], check=True
        )
        subprocess.run([python, "-m", "pip", "install", "--quiet", package], check=True)
    return python


def pfl(python: Path, model: str, rounds: int) -> list[float]:
    """Processor seconds of some rounds by pfl-research."""
    script = Path(__file__).with_name("pfl_peer.py")
    run = subprocess.run(
        [python, script, model, str(rounds)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    found: list[float] = json.loads(run.stdout.splitlines()[-1])
    return found


def clock(repetitions: int, python: Path | None, ray: Path | None) -> dict[str, Times]:
    """By the clock, with all cores: seconds of a round."""
    found = {}
    for model in ("linear", "mlp"):
        run, sides = World(model, 50, 5).ours(), dict[str, list[float]]()
        for threads in (1, os.cpu_count() or 1):
            torch.set_num_threads(threads)
            run()
            sides[f"fedtailor, threads: {threads}"] = [_elapsed(run) for _ in range(10 * repetitions)]
        torch.set_num_threads(1)
        if ray is not None:
            sides["Flower on Ray"] = flower(ray, model, 2 * repetitions)
            sides["Flower on Ray, clients that do nothing"] = flower(ray, "nothing", 2 * repetitions)
        found[f"{model}, 50 clients x 5 steps, by the clock"] = sides
    return found


def _elapsed(run: Run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def flower(python: Path, model: str, rounds: int) -> list[float]:
    """Seconds of some rounds by Flower's simulation on Ray."""
    script = Path(__file__).with_name("ray_peer.py")
    run = subprocess.run(
        [python, script, model, str(rounds)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
    )
    found: list[float] = json.loads(run.stdout.splitlines()[-1])
    return found


def averaging(repetitions: int, python: Path | None, ray: Path | None) -> dict[str, Times]:
    found = {}
    for model in ("linear", "mlp", "tiny_cnn"):
        world = World(model, 50, 5)
        sides = {"fedtailor": world.ours(), "PyTorch loop": world.loop()}
        elsewhere = None if python is None else partial(pfl, python, model, 2 if model == "tiny_cnn" else 5)
        found[f"{model}, 50 clients x 5 steps"] = in_turns(sides, repetitions, elsewhere)
    return found


def private(repetitions: int, python: Path | None, ray: Path | None) -> dict[str, Times]:
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


def clipping(repetitions: int, python: Path | None, ray: Path | None) -> dict[str, Times]:
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
    parser.add_argument("--ray", type=Path, help="where Flower with Ray is, or is to be installed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Full backward hook", UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    python = None if arguments.peers is None else peer(arguments.peers, "pfl==0.6.0")
    ray = None if arguments.ray is None else peer(arguments.ray, "flwr[simulation]==1.41.*")
    found: dict[str, Times] = {}
    for part in arguments.parts or PARTS:
        found |= PARTS[part](3 if arguments.quick else 7, python, ray)
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
