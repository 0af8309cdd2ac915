"""``fedtailor compare``: one table over many run folders, those that differ by their seed in one row."""

import json as jsonlib
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, NamedTuple

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedtailor.cli.options import Json, show
from fedtailor.errors import ConfigError, StoreError

NAMED = ("seed", "study", "strategy._target_")  # settings that have columns of their own, or are what a row is over
Plot = Annotated[
    Path | None, typer.Option(help="Also draw the metric over the rounds, a line for each row: a PNG file.")
]
Csv = Annotated[Path | None, typer.Option("--csv", help="Also write the table to this file, with all digits.")]
Parquet = Annotated[Path | None, typer.Option("--parquet", help="The same as Parquet, whose columns have types.")]
Rounds = Annotated[
    Path | None,
    typer.Option("--rounds", help="Also write every metric of each run, round and site, a row each: .csv or .parquet."),
]


class Run(NamedTuple):
    """A run folder."""

    result: Any  # a fedtailor.result.Result
    settings: dict[str, str]  # of config.yaml, by the names that overrides have
    folder: Path


class Mean(NamedTuple):
    """Over the seeds where it was estimable."""

    mean: float | None  # None: nowhere
    half: float | None  # half of the 95 % interval of the mean, by Student's t; None: of less than two seeds
    seeds: int


class Row(NamedTuple):
    """Runs that differ by their seed at most."""

    study: str
    strategy: str
    settings: dict[str, str]  # those that are not the same in all rows
    seeds: list[int]
    metrics: dict[str, Mean]  # of the federated model; "own …" where each site has a model of its own
    rounds: dict[str, list[tuple[int, Mean]]]  # of the federated model's metrics: after so many rounds
    epsilon: float | None  # the greatest of any site in any of the runs
    seconds: float  # a run, their mean


def compare(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Every run folder in it, at any depth, is compared.")],
    csv: Csv = None,
    parquet: Parquet = None,
    rounds: Rounds = None,
    plot: Plot = None,
    json: Json = False,
) -> None:
    """Compare runs: what differs between them, metrics with 95 % intervals over seeds, epsilon, seconds."""
    from fedtailor.cli import tables

    if rounds is not None and rounds.suffix not in (".csv", ".parquet"):
        raise ConfigError(f"--rounds {rounds}: the file's name says what it is; end it in .csv or .parquet")
    runs, wrong = [], []
    for path in sorted(folder.rglob("result.json")):
        try:
            runs.append(read(path.parent))
        except StoreError as error:
            wrong.append(str(error))
    if not runs and not wrong:
        raise ConfigError(f"{folder}: no run folder, one with a result.json, is in it; see: fedtailor simulate --help")
    rows = compared(runs)
    if csv is not None:
        tables.write_csv(csv, tables.means(rows))
    if parquet is not None:
        tables.write_parquet(parquet, tables.means(rows))
    if rounds is not None:
        writer = tables.write_parquet if rounds.suffix == ".parquet" else tables.write_csv
        writer(rounds, tables.by_round(runs, differing(runs), folder))
    if plot is not None:
        _draw(plot, rows)
    if not show({"rows": [row._asdict() for row in rows], "wrong": wrong}, json) and rows:
        Console().print(shown(rows))
    for text in wrong:
        Console(stderr=True).print(f"left out: {text}", markup=False, highlight=False, soft_wrap=True)
    if wrong:
        raise typer.Exit(1)


def read(folder: Path) -> Run:
    """A run folder.

    Raises:
        StoreError: naming the file that is missing or damaged.
    """
    import yaml

    from fedtailor.result import Result

    path = folder / "result.json"
    try:
        result = Result.model_validate_json(path.read_bytes())
        path = folder / "config.yaml"
        config = yaml.safe_load(path.read_text())
        if not isinstance(config, dict):
            raise ValueError("it holds no plan")
    except (OSError, ValueError, yaml.YAMLError) as error:  # pydantic's is a ValueError
        raise StoreError(f"{path} cannot be read: {str(error).splitlines()[0]}; run it again, or remove it") from error
    config |= {"population": result.population, "simulation": result.simulation}  # are no part of the plan
    unsaid = {"local.optimizer.name": "sgd"}  # a plan does not name plain SGD
    settings = unsaid | {key: value for key, value in _flat(config).items() if key not in NAMED}
    return Run(result, settings | {"engine": result.engine, "status": result.status}, folder)


def _flat(value: Any, name: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        return {k: v for key, each in value.items() for k, v in _flat(each, f"{name}.{key}" if name else key).items()}
    return {} if value is None else {name: value if isinstance(value, str) else jsonlib.dumps(value)}


def compared(runs: Sequence[Run]) -> list[Row]:
    """One row for runs that are equal but for their seed, in the order in which the first of each came."""
    from fedtailor.report import headline

    together: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        key = (run.result.study, run.result.strategy, jsonlib.dumps(run.settings, sort_keys=True))
        together.setdefault(key, []).append(run)
    differ = differing(runs)
    rows = []
    for (study, strategy, _), some in together.items():
        names = dict.fromkeys(name for run in some for name in headline(run.result))
        kinds = {"federated": "", "personal": "own "}
        found = {
            f"{word}{name}": _mean([(run.result.seed, run.result.metrics[kind].get(name)) for run in some])
            for kind, word in kinds.items()
            for name in names
            if all(kind in run.result.metrics for run in some)
        }
        spent = [run.result.privacy.epsilon_max for run in some if run.result.privacy is not None]
        rows.append(
            Row(
                study=study,
                strategy=strategy,
                settings={name: some[0].settings.get(name, "") for name in differ},
                seeds=sorted({run.result.seed for run in some}),
                metrics=found,
                rounds={name: _by_round(some, name) for name in names},
                epsilon=max(spent, default=None),
                seconds=fmean(run.result.timing.wall_s for run in some),
            )
        )
    return rows


def differing(runs: Sequence[Run]) -> list[str]:
    """The settings that are not the same in all runs."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [name for name in names if len({run.settings.get(name) for run in runs}) > 1]


def _by_round(runs: Sequence[Run], name: str) -> list[tuple[int, Mean]]:
    """A metric's mean over the sites, by the rounds trained before it, where it was estimable."""
    at: dict[int, list[tuple[int, float | None]]] = {}
    for run in runs:
        for entry in run.result.history:
            at.setdefault(entry["round"], []).append((run.result.seed, entry["metrics"].get(name)))
    means = [(round, _mean(measured)) for round, measured in sorted(at.items())]
    return [(round, mean) for round, mean in means if mean.mean is not None]


def _mean(measured: Sequence[tuple[int, float | None]]) -> Mean:
    """Of runs with one seed their mean counts once: they are not independent."""
    by_seed: dict[int, list[float]] = {}
    for seed, value in measured:
        if value is not None:
            by_seed.setdefault(seed, []).append(value)
    means = [fmean(values) for values in by_seed.values()]
    if len(means) < 2:
        return Mean(means[0] if means else None, None, len(means))
    from scipy.special import stdtrit

    quantile = float(stdtrit(len(means) - 1, 0.975))
    return Mean(fmean(means), quantile * stdev(means) / math.sqrt(len(means)), len(means))


def shown(rows: Sequence[Row]) -> Table:
    """For people: of the settings only as many as tell the rows apart; the caption names the others."""
    columns, others = _telling(rows)
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    lines = ["mean ± half of the 95 % interval over seeds"] if any(len(row.seeds) > 1 for row in rows) else []
    lines += [f"the rows also differ in {', '.join(others)}"] if others else []
    table = Table(box=SIMPLE_HEAD, caption="\n".join(lines), caption_justify="left", padding=(0, 1, 0, 0))
    for heading in ("study", "strategy", *columns):
        table.add_column(heading, overflow="fold")
    for heading in ("seeds", *metrics, "ε", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            *(row.study, row.strategy, *(row.settings[name] or "–" for name in columns), str(len(row.seeds))),
            *(_cell(row.metrics.get(name), len(row.seeds)) for name in metrics),
            *("no DP" if row.epsilon is None else _at_most(row.epsilon), f"{row.seconds:.1f}"),
        )
    return table


def _telling(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """The settings that tell rows apart which those before leave together, and the others."""
    keys: list[tuple[str, ...]] = [(row.study, row.strategy) for row in rows]
    kept, others = [], []
    for name in rows[0].settings if rows else ():
        finer = [(*key, row.settings[name]) for key, row in zip(keys, rows, strict=True)]
        if len(set(finer)) > len(set(keys)):
            keys = finer
            kept.append(name)
        else:
            others.append(name)
    return kept, others


def _cell(found: Mean | None, seeds: int) -> str:
    if found is None:
        return "–"
    if found.mean is None:
        return "n/e"
    text = f"{found.mean:.3f}" if found.half is None else f"{found.mean:.3f} ± {found.half:.3f}"
    return text if found.seeds == seeds else f"{text} ({found.seeds} of {seeds})"


def _at_most(epsilon: float) -> str:
    from fedtailor.card import at_most

    return at_most(epsilon)


def _draw(path: Path, rows: Sequence[Row]) -> None:
    from fedtailor import store
    from fedtailor.plots import Band, bands_png

    columns, _ = _telling(rows)
    metric = next((name for row in rows for name, points in row.rounds.items() if points), None)
    bands = [
        Band(
            " ".join([row.strategy, *(f"{name}={row.settings[name]}" for name in columns if row.settings[name])]),
            [(round, mean.mean or 0.0, mean.half) for round, mean in row.rounds.get(metric, [])],
        )
        for row in rows
        if metric is not None
    ]
    picture, why = bands_png(metric or "", bands)
    if picture is None:
        raise ConfigError(f"--plot {path}: {why}")
    store.write_bytes(path, picture, mode=0o644)
