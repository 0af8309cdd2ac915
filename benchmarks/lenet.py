"""Label-skewed MNIST with a small convolutional network, beside the figures of Flower's baseline niid_bench.

    python -m benchmarks.lenet [--quick] [--json] [--rounds 50] [--passes 0.2] [--seed 0]

Ten clients, labels by Dirichlet(0.5) and two classes each; two convolutions of 5 x 5 (6 and 16 channels), then 120, 84, 10
units; batches of 64, 60,000 images, 50 rounds. niid_bench's clients take ten passes over their rows in a round, which is
30 million images a strategy and split; here each takes a fifth of a pass, a new one each round: 600,000. niid_bench's
SGD has a rate of 0.01 with momentum 0.9; ours is plain, at 0.1, which goes as far; SCAFFOLD collapses there and has 0.03.
Clients train one after another, because batched convolutions are slower on a CPU; what they do is the strategies' own.
Figures are the accuracy on the 10,000 test images, at best (as niid_bench gives it; here of every fifth round) and in the
end. It needs mnist.npz under $FEDTAILOR_DATA/mnist.
"""

import argparse
import json
import math
import sys
import time

import torch
from torch import Tensor, nn

from benchmarks.data import MNIST, World, dirichlet, mnist, passes, two_classes
from fedtailor import Strategy, seeds, strategies, tree
from fedtailor.strategy import model_in
from fedtailor.training import Train, local_train, mean_loss
from fedtailor.tree import Params, Tree

CLIENTS, BATCH, EVERY = 10, 64, 5
ARMS: dict[str, tuple[Strategy, float]] = {  # and the clients' rate
    "fedavg": (strategies.fedavg(), 0.1),
    "fedprox": (strategies.fedprox(mu=0.01), 0.1),
    "fednova": (strategies.fednova(), 0.1),
    "scaffold": (
        strategies.scaffold(population=CLIENTS),
        0.03,
    ),  # it collapses at 0.1
    "fedavg, 0.03": (strategies.fedavg(), 0.03),  # to compare it with
}
PUBLISHED = {  # best accuracy, https://github.com/adap/flower/tree/main/baselines/niid_bench
    "Dirichlet(0.5)": {"fedavg": 98.89, "scaffold": 99.07, "fedprox": 99.02, "fednova": 98.03},
    "two classes each": {"fedavg": 96.86, "scaffold": 96.92, "fedprox": 96.85, "fednova": 96.65},
}
NET = nn.Sequential(
    nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(),
    nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
)  # fmt: skip


def outputs(params: Params, x: Tensor) -> Tensor:
    """What the network says of images ``[B, 784]``."""
    said: Tensor = torch.func.functional_call(NET, params, (x,))
    return said


def losses(params: Tree, x: Tensor, y: Tensor) -> Tensor:
    """Each image's loss ``[B]``."""
    return nn.functional.cross_entropy(outputs(params, x), y, reduction="none")


def gradient(params: Params, batch: Tree) -> Tree:
    """As :func:`fedtailor.training.plain`, by autograd: faster where nothing is batched over clients."""
    with torch.enable_grad():
        free = {name: p.detach().requires_grad_() for name, p in params.items()}
        return dict(zip(free, torch.autograd.grad(mean_loss(losses, free, batch), list(free.values())), strict=True))


def start(seed: int) -> Params:
    """The network as torch starts it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in NET:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.reset_parameters()
    return {name: p.detach().clone() for name, p in NET.named_parameters()}


def visit(
    train: Train, cast: Tree, memory: Tree, world: World, rows: Tensor, times: float, seed: int
) -> tuple[Tree, Tree]:
    """One client's local training: ``times`` passes over its rows, or a part of one."""
    steps = math.ceil(times * len(rows) / BATCH)
    index, live = passes(rows, BATCH, steps, torch.Generator().manual_seed(seed))
    batches = {"x": world.x[index], "y": world.y[index], "live": live, "scale": 1 / live.sum(1)}
    return train(cast, memory, batches, torch.ones(steps), torch.tensor(float(len(rows))))


def accuracies(world: World, strategy: Strategy, rate: float, rounds: int, times: float, seed: int) -> list[float]:
    """Test accuracy in percent, every ``EVERY`` rounds and after the last."""
    params, train = start(seed), local_train(gradient, strategy, rate)
    state = strategy.init(params)
    memories, found = [strategy.remember(params) for _ in world.clients], list[float]()
    with torch.no_grad():
        for round in range(rounds):
            cast, acc = strategy.broadcast(state), None
            for k, rows in enumerate(world.clients):
                number = seeds.number(seed, "batch", round, k)
                summand, memories[k] = visit(train, cast, memories[k], world, rows, times, number)
                acc = strategy.reduce.add(acc, tree.at(summand, None))
            assert acc is not None
            state = strategy.apply(state, strategy.reduce.done(acc), round)
            if (round + 1) % EVERY == 0 or round + 1 == rounds:
                said = outputs(model_in(strategy.broadcast(state)), world.test_x).argmax(1)
                found.append(100 * float((said == world.test_y).float().mean()))
    return found


def measure(rounds: int, times: float, images: int, seed: int) -> dict[str, dict[str, list[float]]]:
    """Accuracies by partition and strategy; what is known already goes to stderr."""
    data = mnist(images)
    parts = {
        "Dirichlet(0.5)": dirichlet(data[1], CLIENTS, 0.5, seed),
        "two classes each": two_classes(data[1], CLIENTS),
    }
    found: dict[str, dict[str, list[float]]] = {part: {} for part in parts}
    for part, rows in parts.items():
        for name, (strategy, rate) in ARMS.items():
            found[part][name] = accuracies(World(*data, rows), strategy, rate, rounds, times, seed)
            print(
                f"{part}, {name}: {max(found[part][name]):.2f}, {found[part][name][-1]:.2f}",
                file=sys.stderr,
                flush=True,
            )
    return found


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """A table in Markdown: best, last and published, by partition and strategy."""
    lines = ["| | | best | last | niid_bench, best |", "|---|---|---:|---:|---:|"]
    for part, rows in found.items():
        lines += [
            f"| {part} | {n} | {max(v):.2f} | {v[-1]:.2f} | {PUBLISHED[part].get(n, '')} |" for n, v in rows.items()
        ]
    return "\n".join(lines)


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 rounds of one pass, 3,000 images")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--passes", type=float, help="of a client over its rows in a round")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not MNIST.exists():
        sys.exit(f"{MNIST}: there is no MNIST; set FEDTAILOR_DATA to a folder that has mnist/mnist.npz")
    torch.set_num_threads(1)
    rounds, times, images = (10, 1.0, 3000) if arguments.quick else (50, 0.2, 60000)
    rounds, times = arguments.rounds or rounds, arguments.passes or times
    began = time.monotonic()
    found = measure(rounds, times, images, arguments.seed)
    if arguments.json:
        print(json.dumps(found))
        return
    print(f"{rounds} rounds of {times:g} passes over {images} images\n\n{table(found)}\n")
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
