"""pfl-research's CIFAR-10 benchmark in our simulator: 1,500 rounds of 50 of 1,000 users with 50 images each.

``python -m benchmarks.cifar --device cuda --graphs`` for all of it; ``--rounds 5`` shows on a CPU that it works. Pixels are
made up, which changes no time, unless ``--folder`` has CIFAR-10's binary files (data_batch_1.bin to 5 and test_batch.bin).
As there: the model and its first weights, one local epoch in batches of 10 without shuffling, cohorts drawn with
replacement, every user counting once, the 10,000 test images every 10 rounds. Not as there: users' own metrics before and
after training are not measured on these rounds, which there is 6 % of all arithmetic.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedtailor import recipe as recipes
from fedtailor import seeds, strategies
from fedtailor.recipe import Metrics, Part, Recipe
from fedtailor.simulations.engine import simulate_round
from fedtailor.simulations.feed import Feed
from fedtailor.simulations.graphs import plainly, replaying
from fedtailor.simulations.hardware import across, device_of, placed, recipe_on
from fedtailor.simulations.paths import Task, forced
from fedtailor.simulations.precision import multiplied

USERS, POINTS, COHORT, BATCH, LR, EVERY, PIECE = 1000, 50, 50, 10, 0.1, 10, 1000
STEPS = POINTS // BATCH


def model() -> nn.Module:
    """1,626,442 parameters; weights Xavier-uniform."""
    made = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),
        nn.Flatten(), nn.Linear(12544, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10),
    )  # fmt: skip
    for layer in made:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    return made


def read(folder: Path | None) -> tuple[Part, Part]:
    """Training and test images ``[N, 3, 32, 32]``, each channel normalised, and their labels."""
    if folder is None:
        rng = torch.Generator().manual_seed(0)
        sizes = (USERS * POINTS, 10_000)
        parts = [Part(torch.randn(n, 3, 32, 32, generator=rng), torch.randint(10, (n,), generator=rng)) for n in sizes]
        return parts[0], parts[1]
    names = [[f"data_batch_{n}.bin" for n in range(1, 6)], ["test_batch.bin"]]
    records = [
        np.concatenate([np.fromfile(folder / name, np.uint8).reshape(-1, 3073) for name in some]) for some in names
    ]
    pixels = [torch.from_numpy(each[:, 1:].reshape(-1, 3, 32, 32)).float() / 255 for each in records]
    mean, std = pixels[0].mean((0, 2, 3), keepdim=True), pixels[0].std((0, 2, 3), keepdim=True)
    found = [Part((x - mean) / std, torch.from_numpy(r[:, 0]).long()) for x, r in zip(pixels, records, strict=True)]
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(found[0].y)))
    return Part(found[0].x[order], found[0].y[order]), found[1]


def losses(outputs: Tensor, y: Tensor) -> Tensor:
    """Of each image."""
    return cross_entropy(outputs, y, reduction="none")


def metrics(outputs: Tensor, y: Tensor) -> Metrics:
    """How many are right."""
    return {"right": float((outputs.argmax(1) == y).sum())}


def main() -> None:
    """Run it and print seconds."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rounds", type=int, default=1500)
    asked.add_argument("--cohort", type=int, default=COHORT, help="fewer for a glance on a CPU")
    asked.add_argument("--device", default="auto")
    asked.add_argument("--precision", default="float32", choices=["float32", "tf32", "bf16"])
    asked.add_argument("--graphs", action="store_true")
    asked.add_argument("--folder", type=Path)
    told = asked.parse_args()
    began, on = time.monotonic(), device_of(told.device)
    recipe = recipe_on(Recipe("cifar", lambda table: NotImplemented, model, losses, metrics), on)
    train, test = (Part(part.x.to(on), part.y.to(on)) for part in read(told.folder))
    strategy = strategies.fedavg(weighting="equal")
    replay = replaying(on, print) if told.graphs else plainly
    task = Task(recipe, strategy, LR, None, Feed(train), told.cohort, True, told.precision == "bf16", replay)
    many = across(forced("block", task).many, on, on)
    state = strategy.init(placed(on, recipes.initial(recipe, 0)))
    ones = torch.ones(told.cohort, STEPS)
    rng, right = np.random.default_rng(0), None

    def waited() -> float:
        if on.type == "cuda":
            torch.cuda.synchronize(on)
        return time.monotonic()

    with multiplied(told.precision, clipped=False):
        ready = waited()
        for round in range(told.rounds):
            users = torch.from_numpy(rng.integers(USERS, size=told.cohort))
            rows = users[:, None] * POINTS + torch.arange(POINTS)
            numbers = [seeds.number(0, "choices", round, place) for place in range(told.cohort)]
            batches = {
                "rows": rows.view(told.cohort, STEPS, BATCH),
                "live": ones[:, :, None].expand(-1, -1, BATCH),
                "scale": ones / BATCH,
                "seed": torch.tensor(numbers)[:, None].expand(-1, STEPS),
            }
            state, _ = simulate_round(strategy, many, state, {}, batches, ones, ones[:, 0], round, told.cohort)
            if round % EVERY == EVERY - 1:
                pieces = map(Part, test.x.split(PIECE), test.y.split(PIECE))
                right = sum(recipes.evaluate(recipe, state["params"], piece)["right"] or 0 for piece in pieces)
        seconds = waited() - ready
    name = torch.cuda.get_device_name(on) if on.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, {told.precision}, graphs {'on' if told.graphs else 'off'}: {told.rounds} rounds of {told.cohort}")
    print(
        f"{seconds:.1f} s after {ready - began:.1f} s of preparation, {told.rounds * told.cohort / seconds:,.0f} clients/s"
    )
    if right is not None:
        made_up = " (of made-up pixels)" if told.folder is None else ""
        print(f"accuracy {right / len(test.y):.4f}{made_up}")


if __name__ == "__main__":
    main()
