"""The catalogue on label-skewed MNIST, and the robust strategies under attack.

    python -m benchmarks.strategies [--quick] [--json] [--rounds N] [--seed 0] [--defences a,b] [skew | attacks]…

Skew: 10 clients, labels by Dirichlet(0.5) and two classes each. Attacks: 20 clients by Dirichlet(0.5), four of them
liars. A small MLP, plain SGD of rate 0.1 on batches of 32; a client takes steps in proportion to its rows. The figure is
the accuracy on the 10,000 test images after the last round. It needs mnist.npz under $FEDTAILOR_DATA/mnist.
"""

import argparse
import json
import sys
import time

import torch
from torch import Tensor, nn

from benchmarks.attacks import ATTACKS, attacked
from benchmarks.data import MNIST, World, dirichlet, mnist, two_classes
from fedtailor import Strategy, seeds, strategies, tree
from fedtailor.simulations.engine import simulate_round, vmapped
from fedtailor.strategy import model_in
from fedtailor.training import local_train, plain
from fedtailor.tree import Params, Tree

LR, BATCH, STEPS, LIARS = 0.1, 32, 20, 4
SKEWED: dict[str, Strategy] = {
    "fedavg": strategies.fedavg(),
    "fedavgm": strategies.fedavgm(momentum=0.7),
    "fedadagrad": strategies.fedadagrad(lr=0.03),
    "fedadam": strategies.fedadam(lr=0.01),
    "fedyogi": strategies.fedyogi(lr=0.01),
    "fedexp": strategies.fedexp(),
    "fedprox": strategies.fedprox(mu=0.1),
    "scaffold": strategies.scaffold(population=10),
    "fednova": strategies.fednova(),
    "feddyn": strategies.feddyn(alpha=0.1),
    "qfedavg": strategies.qfedavg(q=0.2),
    "term": strategies.term(tilt=1.0),
    "topk, 1 %": strategies.topk(fraction=0.01),
    "quantise, 4 bits": strategies.quantise(bits=4),
    "sign": strategies.sign(),
}
DEFENCES: dict[str, Strategy] = {
    "fedavg": strategies.fedavg(),
    "robust": strategies.robust(attackers=LIARS),
    "median": strategies.median(),
    "trimmed_mean": strategies.trimmed_mean(attackers=LIARS),
    "krum": strategies.krum(attackers=LIARS),
    "multi_krum": strategies.multi_krum(attackers=LIARS),
    "bulyan": strategies.bulyan(attackers=LIARS),
    "geometric_median": strategies.geometric_median(),
    "centred_clipping": strategies.centred_clipping(radius=1.0),
    "norm_bound": strategies.norm_bound(),
    "nnm(krum)": strategies.nnm(strategies.krum(attackers=LIARS), attackers=LIARS),
    "bucketing(median)": strategies.bucketing(strategies.median()),
}


def model() -> nn.Module:
    """784 to 32 to 10."""
    return nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))


def accuracy(world: World, strategy: Strategy, rounds: int, seed: int, turned: int = 0) -> float:
    """Test accuracy in percent after ``rounds``; the last ``turned`` clients train on turned labels."""
    module = model()

    def losses(params: Tree, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(module, params, (x,)), y, reduction="none")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start: Params = {name: p.detach().clone() for name, p in model().named_parameters()}
    train = local_train(plain(losses), strategy, LR, losses)
    counts = torch.tensor([float(len(rows)) for rows in world.clients])
    live = (torch.arange(STEPS) < (STEPS * counts / counts.max()).ceil().clamp(min=2)[:, None]).float()
    state = strategy.init(start)
    memory = tree.stack([strategy.remember(start)] * len(world.clients))
    for round in range(rounds):
        index = torch.stack(
            [
                rows[torch.randint(len(rows), (STEPS, BATCH), generator=seeds.generator(seed, "batch", round, k))]
                for k, rows in enumerate(world.clients)
            ]
        )
        y = world.y[index]
        if turned:
            y[-turned:] = 9 - y[-turned:]
        numbers = torch.tensor([seeds.number(seed, "choices", round, k) for k in range(len(counts))])
        batches = {
            "x": world.x[index],
            "y": y,
            "live": torch.ones(index.shape),
            "scale": torch.full(index.shape[:2], 1 / BATCH),
            "seed": numbers[:, None].expand(-1, STEPS),
        }
        with torch.no_grad():
            state, memory = simulate_round(strategy, vmapped(train), state, memory, batches, live, counts, round)
    params = model_in(strategy.broadcast(state))
    with torch.no_grad():
        found = torch.func.functional_call(module, params, (world.test_x,)).argmax(1)
    return 100 * float((found == world.test_y).float().mean())


def skew(rounds: int, images: int, seed: int) -> dict[str, dict[str, float]]:
    """Accuracy by strategy and partition."""
    data = mnist(images)
    worlds = {
        "Dirichlet(0.5)": World(*data, dirichlet(data[1], 10, 0.5, seed)),
        "two classes each": World(*data, two_classes(data[1], 10)),
    }
    return {
        name: {part: accuracy(world, strategy, rounds, seed) for part, world in worlds.items()}
        for name, strategy in SKEWED.items()
    }


def under_attack(rounds: int, images: int, seed: int, defences: list[str]) -> dict[str, dict[str, float]]:
    """Accuracy by defence and attack."""
    data = mnist(images)
    world = World(*data, dirichlet(data[1], 20, 0.5, seed))
    return {
        name: {
            attack: accuracy(world, attacked(DEFENCES[name], send, LIARS), rounds, seed, LIARS if turned else 0)
            for attack, (send, turned) in ATTACKS.items()
        }
        for name in defences
    }


def table(found: dict[str, dict[str, float]], what: str) -> str:
    """A table in Markdown, one row a strategy."""
    columns = list(next(iter(found.values())))
    lines = [f"| {what} | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    return "\n".join(
        lines + [f"| {name} | {' | '.join(f'{row[c]:.1f}' for c in columns)} |" for name, row in found.items()]
    )


def main() -> None:
    """Measure and print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, few images, the first three defences")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--defences", help="some of them, by name, with commas between; default all")
    parser.add_argument("parts", nargs="*", help="skew, attacks; default both")
    arguments = parser.parse_args()
    if not MNIST.exists():
        sys.exit(f"{MNIST}: there is no MNIST; set FEDTAILOR_DATA to a folder that has mnist/mnist.npz")
    torch.set_num_threads(1)
    rounds, images = arguments.rounds or (8 if arguments.quick else 50), 6000 if arguments.quick else 60000
    began, found = time.monotonic(), {}
    if "skew" in (arguments.parts or ["skew"]):
        found["skew"] = skew(rounds, images, arguments.seed)
    if "attacks" in (arguments.parts or ["attacks"]):
        every = list(DEFENCES)[:3] if arguments.quick else list(DEFENCES)
        some = arguments.defences.split(",") if arguments.defences else every
        if unknown := set(some) - set(DEFENCES):
            sys.exit(f"--defences: no {', '.join(unknown)}; there are {', '.join(DEFENCES)}")
        found["attacks"] = under_attack(rounds, images, arguments.seed, some)
    if arguments.json:
        print(json.dumps(found))
        return
    for part, rows in found.items():
        print(f"{table(rows, f'{part}: accuracy in %, {rounds} rounds, {images} images')}\n")
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
