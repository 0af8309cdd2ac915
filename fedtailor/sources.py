"""Where a site's rows come from. A source yields raw text cells; the recipe's contract gives them meaning."""

import csv
from pathlib import Path
from typing import Protocol

from fedtailor.errors import ContractError
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
