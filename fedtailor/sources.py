"""Where a site's rows come from. A source yields raw text cells; the recipe's contract gives them meaning."""

import csv
from pathlib import Path
from typing import Any, Protocol

from fedtailor.errors import ConfigError, ContractError
from fedtailor.recipe import Table


class DataSource(Protocol):
    """Anything that can hand over a table."""

    def table(self) -> Table:
        """All rows, column by column, as text. Raises ContractError when they cannot be read."""
        ...


class CsvSource:
    """A comma-separated file with a header line, UTF-8."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def table(self) -> Table:
        """Read the file; an empty file, a repeated column or a ragged row is an error that names the line."""
        try:
            with self.path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.reader(file)
                header = next(reader, None)
                header = [name.strip() for name in header or []]
                if not header:
                    raise ContractError(f"data: {self.path} is empty; it needs a header line with the column names")
                if repeated := sorted({name for name in header if header.count(name) > 1}):
                    raise ContractError(f"data: {self.path} names column {repeated[0]!r} twice")
                rows = []
                for row in reader:
                    if not row:
                        continue  # a blank line, the last one most often
                    if len(row) != len(header):
                        raise ContractError(
                            f"data: {self.path} line {reader.line_num} has {len(row)} cells, the header has {len(header)}"
                        )
                    rows.append(row)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ContractError(f"data: cannot read {self.path}: {error}") from error
        return {name: [row[i].strip() for row in rows] for i, name in enumerate(header)}


class ParquetSource:
    """A Parquet file without nested columns. Its values become text as a CSV file would have them; null and NaN are empty."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def table(self) -> Table:
        """Read the file, some rows at a time; a repeated, nested or binary column is an error that names it.

        Raises:
            ConfigError: if pyarrow is not installed.
        """
        try:
            import pyarrow
            from pyarrow import parquet, types
        except ImportError as error:
            raise ConfigError(
                f"data: {self.path}: Parquet comes with an extra: pip install 'fedtailor[tables]'", code="extra"
            ) from error
        cells: dict[str, list[str]] = {}
        try:
            with parquet.ParquetFile(self.path) as file:
                for field in file.schema_arrow:
                    if (name := field.name.strip()) in cells:
                        raise ContractError(f"data: {self.path} names column {name!r} twice")
                    if types.is_nested(field.type) or types.is_binary(field.type) or types.is_large_binary(field.type):
                        raise ContractError(
                            f"data: {self.path}: column {name!r} is of {field.type}; make it text or numbers"
                        )
                    cells[name] = []
                for batch in file.iter_batches():
                    for column, filled in zip(batch.columns, cells.values(), strict=True):
                        filled.extend(map(_text, column.to_pylist()))
        except (OSError, pyarrow.ArrowException) as error:
            raise ContractError(f"data: cannot read {self.path}: {error}") from error
        if not cells:
            raise ContractError(f"data: {self.path} is empty; it needs columns")
        return cells


def _text(value: Any) -> str:
    """A cell; a truth value is a code of 0 or 1, as it is written in most tables."""
    if value is None or value != value:
        return ""
    return str(int(value)) if isinstance(value, bool) else str(value).strip()
