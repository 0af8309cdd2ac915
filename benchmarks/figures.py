"""When which strategy wins: one picture of measurements that other benchmarks printed.

    python -m benchmarks.lenet --json > lenet.json
    python -m benchmarks.strategies attacks --json > attacks.json
    python -m benchmarks.figures lenet.json attacks.json docs/strategies.png

Left and middle: accuracy over the rounds on label-skewed MNIST. Right: accuracy under each attack, means over as many
``attacks.json`` as are given.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.lenet import EVERY
from fedtailor.plots import MARKERS, PALETTE

Skew = dict[str, dict[str, list[float]]]  # split -> strategy -> accuracy of every EVERYth round
Attacks = dict[str, dict[str, float]]  # defence -> attack -> accuracy


def skewed(axes: Axes, split: str, curves: dict[str, list[float]]) -> None:
    """One split's curves."""
    for i, (name, curve) in enumerate(curves.items()):
        rounds = [EVERY * (k + 1) for k in range(len(curve))]
        axes.plot(rounds, curve, color=PALETTE[i % len(PALETTE)], marker=MARKERS[i % len(MARKERS)], ms=3.5, label=name)
    axes.set_title(f"MNIST, {split}", loc="left", fontsize=10)
    axes.set_xlabel("round")
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def attacked(axes: Axes, runs: list[Attacks]) -> None:
    """FedAvg and ``robust``, attack by attack."""
    names = list(runs[0]["robust"])
    for i, defence in enumerate(("fedavg", "robust")):
        means = [mean(run[defence][name] for run in runs) for name in names]
        places = [k + 0.4 * (0.5 - i) for k in range(len(names))]
        axes.barh(places, means, height=0.36, color=PALETTE[1 - i], label=defence)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_title("four liars of twenty", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)


def figure(skew: Skew, runs: list[Attacks]) -> Figure:
    """The three panels."""
    made = Figure(figsize=(12, 4), dpi=130, layout="constrained")
    FigureCanvasAgg(made)  # no pyplot: it keeps global state and looks for a display
    panels = made.subplots(1, len(skew) + 1)
    for axes, (split, curves) in zip(panels, skew.items(), strict=False):
        skewed(axes, split, curves)
    attacked(panels[-1], runs)
    panels[0].set_ylabel("accuracy on 10,000 test images, %")
    for axes in panels:
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    return made


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lenet", type=Path)
    parser.add_argument("attacks", type=Path, nargs="+")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    runs = [json.loads(path.read_text())["attacks"] for path in arguments.attacks]
    figure(json.loads(arguments.lenet.read_text()), runs).savefig(arguments.out)


if __name__ == "__main__":
    main()
