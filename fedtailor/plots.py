"""The picture of a run: how each site fared over the rounds."""

import io
from typing import Any

from fedtailor.result import Result

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # distinct for the colour-blind


def rounds_png(result: Result, metric: str = "auroc") -> bytes | None:
    """``metric`` at every site over the rounds, with what the site reached alone as a dashed line.

    Returns None where matplotlib is not installed or no round was evaluated.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return None
    lines = {site: _line(result.history, site, metric) for site in result.sites}
    lines = {site: points for site, points in lines.items() if points}
    if not lines:
        return None
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for i, (site, points) in enumerate(sorted(lines.items())):
        colour = PALETTE[i % len(PALETTE)]
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=site)
        alone = result.sites[site].metrics.get("local_only", {}).get(metric)
        if alone is not None:
            axes.axhline(alone, color=colour, linestyle="--", linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("rounds")
    axes.set_ylabel(f"{metric.upper()} on the site's held-out part")
    axes.set_title(f"{result.study}: federated (solid) and trained alone (dashed)", loc="left", fontsize=11)
    axes.legend(frameon=False, ncols=2)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    out = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(out, format="png")
    return out.getvalue()


def _line(history: list[dict[str, Any]], site: str, metric: str) -> list[tuple[int, float]]:
    points = [(h["round"], h["sites"].get(site, {}).get(metric)) for h in history]
    return [(round, value) for round, value in points if value is not None]
