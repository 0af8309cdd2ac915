"""The picture of a run, how each site fared over the rounds; and of many, how their models did."""

import io
from typing import Any, NamedTuple

from fedtailor.result import Result

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # distinct for the colour-blind
MARKERS = "osD^vPX"  # and in print


class Curve(NamedTuple):
    """One site's line."""

    site: str
    points: list[tuple[int, float]]  # rounds trained, metric
    alone: float | None  # what the site reached without the others


class Band(NamedTuple):
    """The line of runs that differ by their seed alone."""

    label: str
    points: list[tuple[int, float, float | None]]  # rounds trained, mean, half of the 95 % interval


NO_LIBRARY = "matplotlib is not installed: pip install 'fedtailor[plots]'"


def rounds_png(result: Result) -> tuple[bytes | None, str]:
    """A site's metric over the rounds, solid, and what the site reached alone, dashed.

    Returns:
        the picture and ``""``, or None and why there is none.
    """
    if not _library():
        return None, NO_LIBRARY
    metric, lines = curves(result)
    if not lines:
        return None, "no metric was estimable at any site in any round"
    figure, axes = _drawing()
    for i, line in enumerate(lines):
        colour, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
        axes.plot(*zip(*line.points, strict=True), color=colour, marker=marker, markersize=3.5, lw=1.6, label=line.site)
        if line.alone is not None:
            axes.axhline(line.alone, color=colour, linestyle=(0, (5, 3)), linewidth=1, alpha=0.8, zorder=1)
    if any(line.alone is not None for line in lines):
        axes.plot([], [], color="#555555", linestyle=(0, (5, 3)), linewidth=1, label="the site alone")
    for site in sorted(set(result.sites) - {line.site for line in lines}):
        axes.plot([], [], linestyle="none", label=f"{site}: not estimable")
    axes.set_title(f"{result.study}: the shared model at each site", loc="left", fontsize=11)
    return _finished(figure, axes, f"{_name(metric)} on the site's held-out rows"), ""


def bands_png(metric: str, bands: list[Band]) -> tuple[bytes | None, str]:
    """A metric over the rounds, a line for each band and its 95 % interval over seeds as a shade.

    Returns:
        the picture and ``""``, or None and why there is none.
    """
    if not _library():
        return None, NO_LIBRARY
    bands = [band for band in bands if band.points]
    if not bands:
        return None, "no metric was estimable in any round"
    figure, axes = _drawing()
    for i, band in enumerate(bands):
        colour, marker = PALETTE[i % len(PALETTE)], MARKERS[(i + i // len(PALETTE)) % len(MARKERS)]
        rounds, means, halves = zip(*band.points, strict=True)
        axes.plot(rounds, means, color=colour, marker=marker, markersize=3.5, lw=1.6, label=band.label)
        low = [mean - (half or 0.0) for mean, half in zip(means, halves, strict=True)]
        high = [mean + (half or 0.0) for mean, half in zip(means, halves, strict=True)]
        axes.fill_between(rounds, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_title("mean over sites, by rows; shades: 95 % over seeds", loc="left", fontsize=11)
    return _finished(figure, axes, f"{_name(metric)} on held-out rows"), ""


def _name(metric: str) -> str:
    return metric.upper() if metric in ("auroc", "auprc") else metric


def _library() -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def _drawing() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: it keeps global state and looks for a display
    return figure, figure.subplots()


def _finished(figure: Any, axes: Any, metric: str) -> bytes:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02, y=0.08)
    axes.set_xlabel("rounds trained")
    axes.set_ylabel(metric)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)  # never over a line
    axes.grid(alpha=0.2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def curves(result: Result) -> tuple[str, list[Curve]]:
    """What is drawn: AUROC where any site could estimate it, else the recipe's first metric that one could."""
    names = dict.fromkeys(name for h in result.history for metrics in h["sites"].values() for name in metrics)
    for metric in sorted(names, key=lambda name: name != "auroc"):  # stable: the others keep the recipe's order
        found = [
            Curve(site, _points(result.history, site, metric), one.metrics.get("local_only", {}).get(metric))
            for site, one in sorted(result.sites.items())
        ]
        if lines := [curve for curve in found if curve.points]:
            return metric, lines
    return "", []


def _points(history: list[dict[str, Any]], site: str, metric: str) -> list[tuple[int, float]]:
    measured = [(h["round"], h["sites"].get(site, {}).get(metric)) for h in history]
    points = [(round, value) for round, value in measured if value is not None]
    return [point for point in points if point[0] > 0] or points  # the untrained model would only flatten the rest
