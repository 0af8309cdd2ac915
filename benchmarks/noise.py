"""Nanoseconds that a normal number takes, on one thread: the simulator's noise beside torch.randn and numpy's ziggurat.

    python -m benchmarks.noise

The simulator's is drawn as for 50 clients of the tabular model, 4 steps each, with all that a round does for it.
"""

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch

from fedtailor.simulations.noise import seeded

CLIENTS, STEPS, PARAMETERS = 50, 4, 2114


def nanoseconds(draw: Callable[[], object], repetitions: int = 50) -> list[float]:
    """Of a number, each time."""
    draw()
    found = []
    for _ in range(repetitions):
        began = time.process_time_ns()
        draw()
        found.append((time.process_time_ns() - began) / (CLIENTS * STEPS * PARAMETERS))
    return found


def main() -> None:
    """Measure and print a table in Markdown."""
    torch.set_num_threads(1)
    count = CLIENTS * STEPS * PARAMETERS
    noise, numbers = seeded({"w": torch.zeros(PARAMETERS)}, 1.0), torch.arange(CLIENTS)
    generator = np.random.Generator(np.random.SFC64(0))
    sides: dict[str, Callable[[], object]] = {
        "fedtailor, keyed by client": lambda: list(noise(numbers, STEPS)),
        "torch.randn": lambda: torch.randn(count),
        "numpy, SFC64": lambda: generator.standard_normal(count, dtype=np.float32),
    }
    print("| normal numbers | ns each: median (least to greatest) | millions a second |")
    print("|---|---:|---:|")
    for name, draw in sides.items():
        found = nanoseconds(draw)
        middle = median(found)
        print(f"| {name} | {middle:.1f} ({min(found):.1f} to {max(found):.1f}) | {1e3 / middle:.0f} |")


if __name__ == "__main__":
    main()
