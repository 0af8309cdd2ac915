"""What adapters cost and save: the heart study's perceptron, whole and with adapters, in the simulator.

    python -m benchmarks.adapters [--seeds 3] [OVERRIDE…]

Each seed draws its own split, start, samples and noise; the frozen layer is the same for all. AUROC is on the hospitals'
held-out patients, mean weighted by training rows. Numbers are those of one round and site: what a site sends and what
it is sent, four bytes each.
"""

import argparse
from statistics import mean, stdev

import torch

from fedtailor import recipe as recipes
from fedtailor import tree
from fedtailor.config import build, load
from fedtailor.recipe import Recipe
from fedtailor.simulations.run import simulate
from fedtailor.strategy import Strategy, standing
from fedtailor.study import Plan

ADAPTERS = [
    "strategy=fedavg",
    "strategy=ffa_lora",
    "strategy=fedex_lora recipe.exact=true",
    "strategy=flora recipe.exact=true",
]
ARMS = ["strategy=fedavg", *(f"{arm} recipe.adapters={rank}" for rank in (2, 4) for arm in ADAPTERS)]
ENDS = ["recipe=heart_mlp", "evaluation.every=100000", "evaluation.baseline=false"]  # measure the end only


def sizes(plan: Plan) -> tuple[int, int]:
    """How many numbers a site sends, and how many it is sent."""
    recipe, strategy = build(plan.recipe, Recipe), build(plan.strategy, Strategy)
    with torch.device("meta"):
        params = recipes.shapes(recipe)
        both = standing(strategy, params), strategy.broadcast(strategy.init(params))
    sent, received = (sum(x.numel() for x in tree.leaves(one)) for one in both)
    return sent, received


def auroc(seeds: int, overrides: list[str]) -> str:
    """The mean over seeds, and its standard deviation."""
    found: list[float] = []
    for seed in range(seeds):
        plan, simulation = load([*overrides, f"seed={seed}", f"recipe.split_seed={seed}"])
        value = simulate(plan, build(simulation.data, dict))[0].metrics["federated"]["auroc"]
        found += [] if value is None else [value]
    return f"{mean(found):.3f} ± {stdev(found) if len(found) > 1 else 0:.3f}"


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of the study")
    arguments = parser.parse_args()
    print("| | sent | received | AUROC, no privacy | AUROC, ε = 3 |\n|---|---:|---:|---:|---:|")
    for arm in ARMS:
        chosen = ["study=heart", *ENDS, *arm.split(), *arguments.overrides]
        sent, received = sizes(load(chosen).plan)
        cells = [auroc(arguments.seeds, [*chosen, f"privacy={privacy}"]) for privacy in ("none", "record")]
        print(f"| `{arm}` | {sent} | {received} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
