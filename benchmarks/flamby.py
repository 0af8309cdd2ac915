"""FLamby's heart disease and breast cancer benchmarks with our strategies, beside FLamby's published figures.

    python -m benchmarks.flamby [--quick] [--json] [--seeds 5] [heart | brca]…

A linear model, rounds of 100 local steps of plain SGD: 15 rounds on batches of 4 for heart disease at four hospitals
(accuracy), 5 rounds on batches of 8 for survival in six regions (C-index). The figure is the mean over the sites' own test
parts after the last round, mean of the seeds ± standard deviation; "together" is one test set of all sites. A seed draws
the start and the order of rows; the parts are FLamby's.

FLamby's strategies have FLamby's published rates. For the others, and for FedAvg once more ("our rate"), the client's
rate is the one of RATES with the least mean loss on the sites' training rows; no test row is looked at for it.
Pooled and alone are FLamby's: Adam over the rows. "Alone" trains at one site and is tested at all of them.
It needs heart_disease_uci and tcga_brca under $FEDTAILOR_DATA.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from statistics import mean, stdev
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import flamby_data as data
from benchmarks.data import passes
from benchmarks.flamby_data import Site, Sites
from fedtailor import Strategy, seeds, strategies, tree
from fedtailor.simulations.engine import simulate_round, vmapped
from fedtailor.strategy import model_in
from fedtailor.training import Losses, local_train
from fedtailor.tree import Params, Tree

STEPS, FIRST_SEED = 100, 42  # local steps a round; FLamby's seeds are 42 to 46
RATES = tuple(10 ** (exponent / 2) for exponent in range(-6, -1))  # 0.001 to 0.1
Found = dict[str, dict[str, list[float]]]  # arm -> "sites", "together" and each site -> one figure a seed


class Arm(NamedTuple):
    """A strategy, its clients' rate (None: the best of RATES on training rows) and FLamby's figure."""

    strategy: Strategy
    rate: float | None = None
    published: str = ""


class Task(NamedTuple):
    """One of the two benchmarks."""

    load: Callable[[], Sites]
    loss: Callable[[Params, Tree], Tensor]  # of a batch
    losses: Losses | None  # by row, where a batch's loss is a sum of them
    score: Callable[[Params, Tensor, Tensor], float]
    batch: int
    rounds: int
    adam: tuple[float, int]  # rate and passes of pooled and lone training
    published: dict[str, str]  # of those
    arms: dict[str, Arm]


def _heart_loss(params: Params, batch: Tree) -> Tensor:
    return (data.cross_entropies(params, batch["x"], batch["y"]) * batch["live"]).sum() * batch["scale"]


def _brca_loss(params: Params, batch: Tree) -> Tensor:
    return data.cox(params, batch["x"], batch["y"], batch["live"]).sum() * batch["scale"]


def _adaptive(make: Callable[..., Strategy], lr: float) -> Strategy:
    decay = {} if make is strategies.fedadagrad else {"beta2": 0.999}
    return make(lr=lr, beta1=0.9, tau=1e-8, **decay)


OURS = {
    "fedavg, our rate": Arm(strategies.fedavg()),
    "fedavgm": Arm(strategies.fedavgm()),
    "fedexp": Arm(strategies.fedexp()),
    "feddyn": Arm(strategies.feddyn()),
    "fedprox, our rate": Arm(strategies.fedprox(mu=0.1)),
}
TASKS = {
    "heart": Task(
        data.heart, _heart_loss, data.cross_entropies, data.accuracy, 4, 15, (0.001, 50),
        {"pooled": "73.5 ± 0.3", "alone, 0": "72.2 ± 2.1", "alone, 1": "62.9", "alone, 2": "56.7", "alone, 3": "63.7"},
        {
            "fedavg": Arm(strategies.fedavg(), 10**-3, "68.5 ± 2.8"),
            "fedprox": Arm(strategies.fedprox(mu=0.01), 10**-3, "68.5 ± 2.8"),
            "scaffold": Arm(strategies.scaffold(population=4), 10**-3, "68.4 ± 2.8"),
            "fedadam": Arm(_adaptive(strategies.fedadam, 10**-2), 10**-2, "72.6 ± 1.4"),
            "fedyogi": Arm(_adaptive(strategies.fedyogi, 10**-2), 10**-2.5, "73.1 ± 1.3"),
            "fedadagrad": Arm(_adaptive(strategies.fedadagrad, 10**-0.5), 10**-2.5, "73.1 ± 1.3"),
            **OURS,
            "scaffold, our rate": Arm(strategies.scaffold(population=4)),
            "qfedavg": Arm(strategies.qfedavg()),
            "term": Arm(strategies.term()),
        },
    ),
    "brca": Task(
        data.brca, _brca_loss, None, data.c_index, 8, 5, (0.1, 30),
        {"pooled": "67.6 ± 9.5", "alone, 1": "75.0 ± 3.7"},
        {
            "fedavg": Arm(strategies.fedavg(), 10**-1, "73.2 ± 18.1"),
            "fedprox": Arm(strategies.fedprox(mu=0.1), 10**-1, "72.9 ± 16.8"),
            "scaffold": Arm(strategies.scaffold(population=6), 10**-2, "68.7 ± 3.6"),
            "fedadam": Arm(_adaptive(strategies.fedadam, 10**-1), 10**-2, "81.5 ± 2.6"),
            "fedyogi": Arm(_adaptive(strategies.fedyogi, 10**-1), 10**-2, "81.5 ± 2.6"),
            "fedadagrad": Arm(_adaptive(strategies.fedadagrad, 1.0), 10**-2, "81.3 ± 0.5"),
            **OURS,
            "scaffold, our rate": Arm(strategies.scaffold(population=6)),
        },
    ),
}  # fmt: skip


def start(features: int, seed: int) -> Params:
    """A linear layer as torch starts it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {name: p.detach().clone() for name, p in torch.nn.Linear(features, 1).named_parameters()}


def batches_of(site: Site, batch: int, steps: int, seed: int, name: int | str) -> Tree:
    """``steps`` batches of a site's rows, pass after pass: leaves ``[steps, ...]``."""
    rows = torch.arange(len(site.x))
    index, live = passes(rows, batch, steps, seeds.generator(seed, "batch", name))
    return {"x": site.x[index], "y": site.y[index], "live": live, "scale": 1 / live.sum(1)}


def federated(task: Task, sites: Sites, arm: Arm, rate: float, rounds: int, seed: int) -> Params:
    """The model after ``rounds``."""
    strategy, params = arm.strategy, start(sites.pooled.x.shape[1], seed)
    train = local_train(torch.func.grad(task.loss), strategy, rate, task.losses)
    each = [batches_of(site, task.batch, rounds * STEPS, seed, k) for k, site in enumerate(sites.each)]
    every = tree.map(lambda x: x.unflatten(1, (rounds, STEPS)), tree.stack(each))
    counts = torch.tensor([float(len(site.x)) for site in sites.each])
    live, state = torch.ones(len(counts), STEPS), strategy.init(params)
    memory = tree.stack([strategy.remember(params)] * len(counts))
    with torch.no_grad():
        for round in range(rounds):
            batches = tree.map(lambda x, round=round: x[:, round], every)
            state, memory = simulate_round(strategy, vmapped(train), state, memory, batches, live, counts, round)
    return model_in(strategy.broadcast(state))


def adam(task: Task, site: Site, short: bool, seed: int, name: str) -> Params:
    """The model of Adam over one table's rows."""
    rate, times = task.adam
    steps = (1 if short else times) * -(-len(site.x) // task.batch)
    params = {k: p.requires_grad_() for k, p in start(site.x.shape[1], seed).items()}
    optimizer, batches = torch.optim.Adam(params.values(), lr=rate), batches_of(site, task.batch, steps, seed, name)
    for step in range(steps):
        optimizer.zero_grad()
        task.loss(params, tree.at(batches, step)).backward()
        optimizer.step()
    return {k: p.detach() for k, p in params.items()}


def training_loss(task: Task, sites: Sites, params: Params) -> float:
    """The mean over sites of the loss on all of a site's training rows at once."""
    whole = [{"x": s.x, "y": s.y, "live": torch.ones(len(s.x)), "scale": 1 / len(s.x)} for s in sites.each]
    return mean(float(task.loss(params, batch)) for batch in whole)


def measure(task: Task, quick: bool, seed_count: int) -> tuple[Found, dict[str, float]]:
    """Figures by arm, and the client's rate of each federated arm."""
    sites, rounds = task.load(), 2 if quick else task.rounds
    numbers = range(FIRST_SEED, FIRST_SEED + seed_count)
    found: Found = {}

    def note(name: str, models: list[Params]) -> None:
        row = found[name] = {"sites": list[float](), "together": list[float]()}
        for params in models:
            each = [task.score(params, site.test_x, site.test_y) for site in sites.each]
            row["sites"].append(mean(each))
            row["together"].append(task.score(params, sites.pooled.test_x, sites.pooled.test_y))
            for k, value in enumerate(each):
                row.setdefault(str(k), []).append(value)

    note("pooled", [adam(task, sites.pooled, quick, seed, "pooled") for seed in numbers])
    for k, site in enumerate(sites.each):
        note(f"alone, {k}", [adam(task, site, quick, seed, str(k)) for seed in numbers])
    rates = {}
    for name, arm in task.arms.items():
        tried = {}
        for rate in (arm.rate,) if arm.rate else RATES[::2] if quick else RATES:
            models = [federated(task, sites, arm, rate, rounds, seed) for seed in numbers]
            losses = [training_loss(task, sites, params) for params in models]
            tried[rate] = (sum(losses) if all(x == x for x in losses) else float("inf"), models)
        rates[name] = min(tried, key=lambda rate: tried[rate][0])
        note(name, tried[rates[name]][1])
    return found, rates


def table(task: Task, found: Found, rates: dict[str, float]) -> str:
    """A table in Markdown, one row an arm."""
    lines = ["| | client's rate | mean of sites | together | FLamby, mean of sites |", "|---|---:|---:|---:|---:|"]
    for name, row in found.items():
        cells = [f"{mean(v):.1f} ± {stdev(v) if len(v) > 1 else 0:.1f}" for v in (row["sites"], row["together"])]
        published = task.arms[name].published if name in task.arms else task.published.get(name, "")
        rate = f"{rates[name]:.2g}" if name in rates else ""
        lines.append(f"| {name} | {rate} | {cells[0]} | {cells[1]} | {published} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds, one pass of Adam, three rates")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 42 on")
    parser.add_argument("parts", nargs="*", help="heart, brca; default both")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(TASKS):
        sys.exit(f"parts: no {', '.join(unknown)}; there are {', '.join(TASKS)}")
    for folder in (data.HEART, data.BRCA):
        if not folder.exists():
            sys.exit(f"{folder}: it is not there; set FEDTAILOR_DATA to a folder that has it")
    torch.set_num_threads(1)
    began = time.monotonic()
    found = {name: measure(TASKS[name], arguments.quick, arguments.seeds) for name in arguments.parts or TASKS}
    if arguments.json:
        print(json.dumps({name: {"figures": figures, "rates": rates} for name, (figures, rates) in found.items()}))
        return
    for name, (figures, rates) in found.items():
        print(f"{name}\n\n{table(TASKS[name], figures, rates)}\n")
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
