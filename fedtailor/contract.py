"""The data contract: what columns, types, units, codes and bounds a site's table must satisfy. It is public knowledge.

Preparation may use the contract and nothing learnt from data, so that it costs no privacy and is the same at all sites.
"""

import difflib
import math
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Annotated, Literal, NamedTuple

import yaml
from pydantic import Field, PositiveInt, ValidationError, model_validator

from fedtailor.errors import ConfigError, ContractError
from fedtailor.recipe import Table
from fedtailor.study import Frozen

Code = str | int | float | bool
MOST_PROBLEMS = 10  # told at once; people mend a file in one go, not in ten


class Column(Frozen):
    """One feature."""

    name: str
    kind: Literal["number", "category"]
    description: str = ""
    unit: str = ""
    bounds: tuple[float, float] | None = None  # numbers: nothing outside is plausible
    codes: tuple[Code, ...] = ()  # categories: every code there is
    missing: tuple[Code, ...] = ()  # cells that mean missing, beside the empty one
    default: float | None = None  # numbers: what stands in where it is missing; the middle of the bounds if not set
    required: bool = False  # whether a missing cell is an error

    @model_validator(mode="after")
    def _kind_has_what_it_needs(self) -> "Column":
        if self.kind == "number":
            if self.bounds is None or not self.bounds[0] < self.bounds[1]:
                raise ValueError(f"{self.name}: a number needs bounds [low, high], got {self.bounds}")
            if self.default is not None and not self.bounds[0] <= self.default <= self.bounds[1]:
                raise ValueError(f"{self.name}: default {self.default} lies outside the bounds {list(self.bounds)}")
            if self.codes:
                raise ValueError(f"{self.name}: codes are for a category, bounds for a number")
        else:
            if len(self.codes) < 2:
                raise ValueError(f"{self.name}: a category needs at least two codes, got {list(self.codes)}")
            if self.bounds is not None or self.default is not None:
                raise ValueError(f"{self.name}: bounds and default are for a number; a category has codes")
        _distinct(self.name, [*self.codes, *self.missing])
        return self


class Label(Frozen):
    """What is predicted: 1 for a positive code, 0 for any other known one."""

    name: str
    positive: Annotated[tuple[Code, ...], Field(min_length=1)]
    negative: Annotated[tuple[Code, ...], Field(min_length=1)]
    description: str = ""

    @model_validator(mode="after")
    def _codes_are_distinct(self) -> "Label":
        _distinct(self.name, [*self.positive, *self.negative])
        return self


class Contract(Frozen):
    """A table's contract."""

    name: str
    version: PositiveInt = 1
    description: str = ""
    columns: Annotated[tuple[Column, ...], Field(min_length=1)]
    label: Label
    subject: str | None = None  # the column that says whose row it is; None: every row is a person of its own
    min_rows: PositiveInt = 20

    @model_validator(mode="after")
    def _names_are_distinct(self) -> "Contract":
        names = [column.name for column in self.columns] + [self.label.name]
        names += [self.subject] if self.subject else []
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"column {repeated[0]!r} is declared twice")
        return self


def _distinct(name: str, codes: list[Code]) -> None:
    known = [_same(code) for code in codes]
    if repeated := sorted({code for code in known if known.count(code) > 1}):
        raise ValueError(f"{name}: {repeated[0]} stands twice among its codes; each needs one meaning")


class Row(NamedTuple):
    """One checked row."""

    values: tuple[float | None, ...]  # per column: the number, or the index of the code; None where missing
    label: float
    subject: str | None


def load_contract(name: str) -> Contract:
    """Read ``configs/contract/<name>.yaml``.

    Raises:
        ConfigError: if there is none, with the nearest name, or if it is not a contract.
    """
    folder = resources.files("fedtailor.configs") / "contract"
    there = sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))
    if name not in there:
        near = difflib.get_close_matches(name, there, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(there)}"
        raise ConfigError(f"contract {name!r} is not installed{hint}", code="unknown")
    try:
        return Contract.model_validate(yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"contract {name!r} is malformed: {error}") from error


def check(contract: Contract, table: Table, most: int = MOST_PROBLEMS) -> list[Row]:
    """Every row of ``table``, checked and coded.

    Raises:
        ContractError: with up to ``most`` problems, each naming column, row (the first is 1), value and the way out.
    """
    problems = list(_columns(contract, table))
    if problems:
        raise ContractError(_told(problems, most))
    readers = [_reader(column) for column in contract.columns]
    rows: list[Row] = []
    count = len(table[contract.label.name])
    subjects = table[contract.subject] if contract.subject else None
    for i in range(count):
        values: list[float | None] = []
        for column, read in zip(contract.columns, readers, strict=True):
            try:
                values.append(read(table[column.name][i]))
            except ValueError as error:
                problems.append(f"{column.name}, row {i + 1}: {error}")
        try:
            label = _label(contract.label, table[contract.label.name][i])
        except ValueError as error:
            problems.append(f"{contract.label.name}, row {i + 1}: {error}")
            label = 0.0
        if subjects is not None and not subjects[i]:
            problems.append(f"{contract.subject}, row {i + 1}: the subject is missing; every row needs one")
        if len(problems) > most:
            break
        rows.append(Row(tuple(values), label, subjects[i] if subjects is not None else None))
    if problems:
        raise ContractError(_told(problems, most))
    if count < contract.min_rows:
        raise ContractError(f"{count} rows; the contract {contract.name!r} asks for at least {contract.min_rows}")
    return rows


def _columns(contract: Contract, table: Table) -> Iterator[str]:
    wanted = [column.name for column in contract.columns] + [contract.label.name]
    wanted += [contract.subject] if contract.subject else []
    for name in wanted:
        if name not in table:
            near = difflib.get_close_matches(name, [c for c in table if c not in wanted], n=1, cutoff=0.6)
            yield f"column {name!r} is missing" + (f"; rename {near[0]!r}, if that is it" if near else "")


def _told(problems: list[str], most: int) -> str:
    count = "ten" if most == MOST_PROBLEMS else most
    more = [f"and more: only the first {count} are told"] if len(problems) > most else []
    return "; ".join(problems[:most] + more)


def _same(cell: Code) -> str:
    """A cell or a code, written one way: ``1.0``, ``01`` and ``1`` are one code, and case does not matter."""
    text = str(cell).strip().lower()
    try:
        return str(int(text))  # exactly: codes of 18 digits are in use
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        return text
    return str(int(value)) if value.is_integer() else repr(value)


def _reader(column: Column) -> Callable[[str], float | None]:
    missing = {"", *(_same(code) for code in column.missing)}
    codes = {_same(code): float(i) for i, code in enumerate(column.codes)}

    def read(cell: str) -> float | None:
        same = _same(cell)
        if same in missing:
            if column.required:
                raise ValueError("a value is required and there is none")
            return None
        if column.kind == "category":
            if same not in codes:
                raise ValueError(f"{cell!r} is not one of the codes {', '.join(codes)}")
            return codes[same]
        try:
            value = float(cell)
        except ValueError:
            raise ValueError(f"{cell!r} is not a number") from None
        assert column.bounds is not None
        low, high = column.bounds
        if not (math.isfinite(value) and low <= value <= high):
            unit = f"; is it in {column.unit}?" if column.unit else ""
            raise ValueError(f"{cell} lies outside {low:g} to {high:g}{unit}")
        return value

    return read


def _label(label: Label, cell: str) -> float:
    same = _same(cell)
    if same in {_same(code) for code in label.positive}:
        return 1.0
    if same in {_same(code) for code in label.negative}:
        return 0.0
    if not same:
        raise ValueError("the label is missing; leave such a row out")
    raise ValueError(f"{cell!r} is not one of the label's codes")
