"""A run's folder, and the table that a person sees at the end."""

from pathlib import Path
from statistics import median

from rich.table import Table

from fedtailor import store
from fedtailor.card import model_card
from fedtailor.plots import rounds_png
from fedtailor.result import Result, model_bytes
from fedtailor.study import Plan
from fedtailor.tree import Params


def write_run(folder: Path, *, result: Result, plan: Plan, params: Params, config_yaml: str) -> None:
    """Write ``model.safetensors``, ``rounds.png``, ``model_card.md``, ``config.yaml`` and, last, ``result.json``.

    Raises:
        StoreError: if a file cannot be written; the ones before it are whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store.write_bytes(folder / "model.safetensors", model_bytes(params), mode=0o644)
    plot = rounds_png(result)
    if plot is not None:
        store.write_bytes(folder / "rounds.png", plot, mode=0o644)
    store.write_text(folder / "model_card.md", model_card(result, plan, plot is not None), mode=0o644)
    store.write_text(folder / "config.yaml", config_yaml, mode=0o644)
    store.write_text(folder / "result.json", result.model_dump_json(by_alias=True, indent=1) + "\n", mode=0o644)


def console_table(result: Result, budget: float | None = None) -> Table:
    """Per site: AUROC and accuracy alone against federated, epsilon, traffic.

    Args:
        budget: the epsilon that each site allows, if it is known.
    """
    title = f"{result.study}: {result.rounds} rounds of {result.strategy}, {result.status}"
    table = Table(title=title, caption=_caption(result))
    table.add_column("site", no_wrap=True)
    for heading in ("rows", "AUROC\nalone → fed.", "accuracy\nalone → fed.", "ε\nspent", "bytes\nout", "bytes\nin"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, site in sorted(result.sites.items()):
        alone, federated = site.metrics.get("local_only", {}), site.metrics.get("federated", {})
        table.add_row(
            name,
            str(site.rows),
            *(f"{_short(alone.get(m))} → {_short(federated.get(m))}" for m in ("auroc", "accuracy")),
            _spent(site.epsilon, budget),
            f"{site.bytes_sent:,}",
            f"{site.bytes_received:,}",
        )
    alone, federated = result.metrics.get("local_only", {}), result.metrics.get("federated", {})
    table.add_section()
    table.add_row(
        "all, by rows",
        str(sum(site.rows for site in result.sites.values())),
        *(f"{_short(alone.get(m))} → {_short(federated.get(m))}" for m in ("auroc", "accuracy")),
    )
    return table


def _short(value: float | None) -> str:
    return "n/e" if value is None else f"{value:.3f}"


def _spent(epsilon: float | None, budget: float | None) -> str:
    if epsilon is None:
        return "no DP"
    return f"{epsilon:.3f}" + (f" of {budget:g}" if budget is not None else "")


def _caption(result: Result) -> str:
    seconds = f"{median(result.timing.round_s):.2f} s a round (median)" if result.timing.round_s else "no rounds"
    seconds += "; n/e: not estimable"
    if result.privacy is None:
        return f"{seconds}; no differential privacy"
    return f"{seconds}; ε per {result.privacy.unit} at δ = {result.privacy.delta:g}, PLD, the whole study"
