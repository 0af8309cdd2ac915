"""A run's folder, and the table that a person sees at the end."""

from pathlib import Path
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedtailor import store
from fedtailor.card import at_most, model_card, number
from fedtailor.errors import StoreError
from fedtailor.plots import rounds_png
from fedtailor.recipe import Metrics
from fedtailor.result import Kind, Result
from fedtailor.study import Plan
from fedtailor.treefile import Model, pieces_of

HEADLINE = ("auroc", "accuracy")


def write_run(folder: Path, *, result: Result, plan: Plan, model: Model, config_yaml: str) -> None:
    """Write ``model.safetensors``, ``rounds.png``, ``model_card.md``, ``config.yaml`` and, last, ``result.json``.

    A folder with a ``result.json`` is complete; each file is there whole or not at all.

    Raises:
        StoreError: if a file cannot be written, or the model on disk is not the one that ``result`` describes.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in ("result.json", "rounds.png"):  # of an earlier run: they would describe another model
            (folder / stale).unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"{folder} cannot be made: {error.strerror}; choose another folder") from error
    path = folder / result.model.path
    store.write_pieces(path, pieces_of(model), mode=0o644)
    if store.digest(path) != result.model.sha256:
        raise StoreError(f"{path} is not the model that the result describes; check the disk and write the run again")
    plot, no_plot = rounds_png(result)
    if plot is not None:
        store.write_bytes(folder / "rounds.png", plot, mode=0o644)
    store.write_text(folder / "model_card.md", model_card(result, plan, no_plot), mode=0o644)
    store.write_text(folder / "config.yaml", config_yaml, mode=0o644)
    store.write_text(folder / "result.json", result.model_dump_json(by_alias=True, indent=1) + "\n", mode=0o644)


def console_table(result: Result) -> Table:
    """Per site: the headline metrics alone, federated and by its own model, epsilon of the plan's, all rounds' traffic."""
    title = f"{result.study}: {result.rounds} rounds of {result.strategy}, {result.status}"
    table = Table(title=title, caption=_caption(result), caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown = headline(result)
    table.add_column("site", no_wrap=True)
    budget = result.privacy.epsilon_budget if result.privacy else None
    cost = "ε spent" + ("" if budget is None else f"\nof {budget:g}")
    kinds: list[Kind] = ["local_only", "federated"]
    if "personal" in result.metrics:
        kinds.append("personal")
        shown = shown[:1]  # three figures of two metrics are wider than a terminal
    path = " → ".join({"local_only": "alone", "federated": "fed.", "personal": "own"}[kind] for kind in kinds)
    for heading in ("rows", *(f"{_title(name)}\n{path}" for name in shown), cost, "bytes\nout", "bytes\nin"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, site in sorted(result.sites.items()):
        table.add_row(
            name,
            f"{site.rows:,}",
            *(" → ".join(_short(site.metrics.get(kind, {}), m) for kind in kinds) for m in shown),
            "no DP" if site.epsilon is None else at_most(site.epsilon),
            *((_size(site.bytes_sent), _size(site.bytes_received)) if site.bytes_received else ("–", "–")),
        )
    table.add_section()
    table.add_row(
        "mean, by rows",
        f"{sum(site.rows for site in result.sites.values()):,}",
        *(" → ".join(_short(result.metrics.get(kind, {}), m) for kind in kinds) for m in shown),
    )
    return table


def headline(result: Result) -> list[str]:
    """The two metrics to show where there is no room for all: AUROC and accuracy, or the recipe's first two."""
    names = list(dict.fromkeys(name for site in result.sites.values() for m in site.metrics.values() for name in m))
    return [name for name in HEADLINE if name in names] or names[:2]


def _title(metric: str) -> str:
    return metric.upper() if metric in ("auroc", "auprc", "mae", "rmse") else metric


def _short(metrics: Metrics, name: str) -> str:
    if name not in metrics:
        return "–"  # not measured
    return "n/e" if metrics[name] is None else number(metrics[name])


def _size(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def _caption(result: Result) -> str:
    timing, lines = result.timing, []
    if timing.round_s:
        lines.append(
            f"{median(timing.round_s):.2f} s a round (median of {len(timing.round_s)}), {timing.wall_s:.1f} s in all"
        )
    if result.privacy is None:
        lines.append("no differential privacy")
    else:
        note = " (simulated noise: do not release)" if result.engine == "simulation" else ""
        lines.append(f"ε per {result.privacy.unit} at δ = {result.privacy.delta:g}, over the whole study, by PLD{note}")
    shown = [
        site.metrics[kind].get(m, 0.0)
        for site in result.sites.values()
        for kind in site.metrics
        for m in headline(result)
    ]
    if None in shown:
        lines.append("n/e: not estimable (too few held-out rows, or one class only)")
    if result.dropped:
        lines.append(f"replies that did not count: {len(result.dropped)}; the model card names them")
    return "\n".join(lines)
