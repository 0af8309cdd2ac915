"""One finding of the doctor's: what was looked at, how it stands, what was found, and how to mend it."""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from fedtailor.errors import FedtailorError

State = Literal["ok", "warning", "wrong"]


class Row(NamedTuple):
    """One line of the doctor's."""

    name: str
    state: State
    found: str
    mend: str = ""


def unchecked(name: str, why: str) -> Row:
    """A check that another one stands before; that one says what to do."""
    return Row(name, "warning", f"not checked: {why}")


def tried(name: str, check: Callable[[], Iterable[Row]]) -> list[Row]:
    """The rows of a check. One that fails says so in a row of its own, and never in a traceback."""
    rows: list[Row] = []
    try:
        for row in check():
            rows.append(row)
    except FedtailorError as error:
        rows.append(Row(name, "wrong", str(error)))
    except Exception as error:  # a check that breaks must not take the others with it
        rows.append(Row(name, "wrong", f"it could not be checked: {type(error).__name__}: {error}"))
    return [row._replace(found=_plain(row.found), mend=_plain(row.mend)) for row in rows]


def _plain(text: str) -> str:
    """Without what could move a terminal's cursor: some of it was said by others."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
