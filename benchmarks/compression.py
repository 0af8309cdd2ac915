"""What compression saves and costs: bytes that a client sends in a round, and accuracy, on label-skewed MNIST.

    python -m benchmarks.compression [--quick] [--json] [--rounds N] [--seed 0]

Ten clients by Dirichlet(0.5), as in benchmarks.strategies. Bytes are those of the payload that a site's daemon would
send: a safetensors file, or packed. It needs mnist.npz under $FEDTAILOR_DATA/mnist.
"""

import argparse
import json
import sys
from typing import Any

import torch

from benchmarks.strategies import MNIST, World, accuracy, dirichlet, mnist
from fedtailor import Strategy, packing, store, strategies, tree
from fedtailor.tree import Tree

CLIENTS = 10
SHRUNK: dict[str, Strategy] = {
    "fedavg": strategies.fedavg(),
    "quantise, 8 bits": strategies.quantise(bits=8),
    "quantise, 4 bits": strategies.quantise(bits=4),
    "quantise, 2 bits": strategies.quantise(bits=2),
    "sign": strategies.sign(),
    "topk, 10 %": strategies.topk(fraction=0.1),
    "topk, 1 %": strategies.topk(fraction=0.01),
    "topk, 1 %, of 8 bits": strategies.quantise(strategies.topk(fraction=0.01), bits=8),
}


def weighed(strategy: Strategy, sizes: list[int]) -> Strategy:
    """``strategy``, which notes the size of each client's payload as its summands are reduced."""

    def add(acc: Tree | None, block: Tree) -> Tree:
        for row in range(len(tree.leaves(block)[0])):
            flat = tree.flatten(tree.at(block, row))
            sizes.append(sum(len(piece) for piece in (packing.pack if strategy.packed else store.safetensors)(flat)))
        return strategy.reduce.add(acc, block)

    return strategy._replace(reduce=strategy.reduce._replace(add=add))


def measure(rounds: int, images: int, seed: int) -> dict[str, dict[str, float]]:
    """By strategy: mean bytes of a client's payload, how often it goes into FedAvg's, accuracy in percent."""
    data = mnist(images)
    world = World(*data, dirichlet(data[1], CLIENTS, 0.5, seed))
    found: dict[str, dict[str, float]] = {}
    for name, strategy in SHRUNK.items():
        sizes: list[int] = []
        reached = accuracy(world, weighed(strategy, sizes), rounds, seed)
        mean = sum(sizes) / len(sizes)
        found[name] = {"bytes": mean, "times": found["fedavg"]["bytes"] / mean if found else 1.0, "accuracy": reached}
    return found


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 rounds, 6,000 images")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments: Any = parser.parse_args()
    if not MNIST.exists():
        sys.exit(f"{MNIST}: there is no MNIST; set FEDTAILOR_DATA to a folder that has mnist/mnist.npz")
    torch.set_num_threads(1)
    rounds, images = arguments.rounds or (8 if arguments.quick else 50), 6000 if arguments.quick else 60000
    found = measure(rounds, images, arguments.seed)
    if arguments.json:
        print(json.dumps(found))
        return
    print(f"| {rounds} rounds, {images} images | bytes up, a client and round | times smaller | accuracy in % |")
    print("|---|---:|---:|---:|")
    for name, row in found.items():
        print(f"| {name} | {row['bytes']:,.0f} | {row['times']:.1f} | {row['accuracy']:.1f} |")


if __name__ == "__main__":
    main()
