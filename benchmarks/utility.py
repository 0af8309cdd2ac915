"""What taking part is worth, and what privacy costs: the heart study in the simulator, over several seeds.

    python -m benchmarks.utility [--seeds 5] [--json] [OVERRIDE…]

Each seed draws its own split into training and held-out patients, its own start, samples and noise. The figure is the
AUROC on each hospital's held-out patients; the mean is weighted by training rows. Switzerland's held-out part has too
few patients without disease for an AUROC.
"""

import argparse
import json
from statistics import mean, stdev
from typing import Any

from fedtailor.config import build, load
from fedtailor.result import Result
from fedtailor.simulations.run import simulate

ARMS = {"alone": "none", "federated": "none", "federated, ε = 3": "record"}


def measure(seeds: int, overrides: list[str]) -> dict[str, dict[str, list[float]]]:
    """AUROC by arm and site, one figure a seed; ``mean`` is the mean over the sites."""
    found: dict[str, dict[str, list[float]]] = {arm: {} for arm in ARMS}
    for seed in range(seeds):
        results = {privacy: _simulate(seed, f"privacy={privacy}", overrides) for privacy in ("none", "record")}
        for arm, privacy in ARMS.items():
            result, kind = results[privacy], "local_only" if arm == "alone" else "federated"
            by_site: dict[str, Any] = {name: site.metrics[kind]["auroc"] for name, site in result.sites.items()}
            for name, value in {**by_site, "mean": result.metrics[kind]["auroc"]}.items():
                if value is not None:
                    found[arm].setdefault(name, []).append(value)
    return found


def _simulate(seed: int, privacy: str, overrides: list[str]) -> Result:
    last = "evaluation.every=100000"  # measure the end only
    plan, simulation = load(["study=heart", privacy, f"seed={seed}", f"++recipe.split_seed={seed}", last, *overrides])
    return simulate(plan, build(simulation.data, dict))[0]


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of the study")
    arguments = parser.parse_args()
    found = measure(arguments.seeds, arguments.overrides)
    if arguments.json:
        print(json.dumps(found))
        return
    sites = list(found["alone"])
    print(f"| AUROC, mean of {arguments.seeds} seeds ± standard deviation | {' | '.join(sites)} |")
    print(f"|---|{'---:|' * len(sites)}")
    for arm, by_site in found.items():
        cells = [f"{mean(by_site[s]):.3f} ± {stdev(by_site[s]) if len(by_site[s]) > 1 else 0:.3f}" for s in sites]
        print(f"| {arm} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
