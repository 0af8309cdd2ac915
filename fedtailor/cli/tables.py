"""Tables of runs as files, for pandas, polars and the like: CSV, or Parquet, whose columns have types."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedtailor import store
from fedtailor.errors import ConfigError

if TYPE_CHECKING:
    from fedtailor.cli.compare import Row, Run

MOST = 1 << 63  # what an int64 cannot hold


class Column(NamedTuple):
    """Cells of one kind."""

    kind: type  # str, int, float or bool
    cells: list[Any]  # None: there is no value


Columns = Mapping[str, Column]


def means(rows: Sequence["Row"]) -> dict[str, Column]:
    """What ``fedtailor compare`` shows, with every setting that differs and all digits."""
    columns = {
        "study": Column(str, [row.study for row in rows]),
        "strategy": Column(str, [row.strategy for row in rows]),
        **{name: typed([row.settings[name] for row in rows]) for name in (rows[0].settings if rows else ())},
        "seeds": Column(str, [" ".join(map(str, row.seeds)) for row in rows]),
    }
    for name in dict.fromkeys(name for row in rows for name in row.metrics):
        found = [row.metrics.get(name) for row in rows]
        columns[name] = Column(float, [one and one.mean for one in found])
        columns[f"{name} ± 95 %"] = Column(float, [one and one.half for one in found])
    columns["epsilon"] = Column(float, [row.epsilon for row in rows])
    columns["seconds"] = Column(float, [row.seconds for row in rows])
    return columns


def by_round(runs: Sequence["Run"], differ: Sequence[str], root: Path) -> dict[str, Column]:
    """One row for a run, round, site and metric; without a site, the mean over the sites by training rows.

    Args:
        differ: settings that are not the same in all runs.
        root: a run is named by its folder within it.
    """
    lines = [
        (run, entry["round"], site, name, value)
        for run in runs
        for entry in run.result.history
        for site, metrics in [*entry["sites"].items(), (None, entry["metrics"])]
        for name, value in metrics.items()
    ]
    whose = [run for run, *_ in lines]
    return {
        "run": Column(str, [str(run.folder.relative_to(root)) for run in whose]),
        "study": Column(str, [run.result.study for run in whose]),
        "strategy": Column(str, [run.result.strategy for run in whose]),
        **{name: typed([run.settings.get(name, "") for run in whose]) for name in differ},
        "seed": typed([str(run.result.seed) for run in whose]),
        "round": Column(int, [round for _, round, *_ in lines]),
        "site": Column(str, [site for *_, site, _, _ in lines]),
        "metric": Column(str, [name for *_, name, _ in lines]),
        "value": Column(float, [value for *_, value in lines]),
    }


def typed(texts: Sequence[str]) -> Column:
    """A setting's texts as what all of them are: truth values, whole numbers, numbers, or else words; an empty one is none.

    >>> typed(["5", "", "7"]), typed(["5", "0.5"]).cells, typed(["5", "none"]).cells
    (Column(kind=<class 'int'>, cells=[5, None, 7]), [5.0, 0.5], ['5', 'none'])
    """
    values = [_value(text) if text else None for text in texts]
    kinds = {type(value) for value in values if value is not None}
    if kinds in ({bool}, {int}):
        return Column(kinds.pop(), values)
    if kinds and kinds <= {int, float}:
        return Column(float, [None if value is None else float(value) for value in values])
    return Column(str, [text or None for text in texts])


def _value(text: str) -> bool | int | float | str:
    try:
        value = json.loads(text, parse_constant=str)  # NaN and infinity are words here
    except ValueError:
        return text
    if isinstance(value, int):  # a truth value too
        return value if -MOST <= value < MOST else text
    return value if isinstance(value, float) and abs(value) < float("inf") else text


def write_csv(path: Path, columns: Columns) -> None:
    """Replace ``path`` by the table as CSV; a cell is empty where there is no value.

    Raises:
        StoreError: if it cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*([_text(cell) for cell in column.cells] for column in columns.values()), strict=True))
    store.write_text(path, text.getvalue(), mode=0o644)


def _text(cell: Any) -> Any:
    return json.dumps(cell) if isinstance(cell, bool) else cell


def write_parquet(path: Path, columns: Columns) -> None:
    """Replace ``path`` by the table as Parquet: strings, int64, float64, booleans, and null where there is no value.

    Raises:
        ConfigError: if pyarrow is not installed.
        StoreError: if it cannot be written.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(
            f"{path}: Parquet comes with an extra: pip install 'fedtailor[tables]'", code="extra"
        ) from error
    types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
    made = {name: pyarrow.array(column.cells, type=types[column.kind]) for name, column in columns.items()}
    whole = io.BytesIO()
    parquet.write_table(pyarrow.table(made), whole)
    store.write_bytes(path, whole.getvalue(), mode=0o644)
