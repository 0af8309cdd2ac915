"""Options that several commands share, and how they print."""

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON for machines.")]
ServerHome = Annotated[Path, typer.Option("--home", help="The coordinator's folder.", envvar="FEDTAILOR_SERVER_HOME")]
SiteHome = Annotated[Path, typer.Option("--home", help="The site's folder.", envvar="FEDTAILOR_SITE_HOME")]
SERVER_HOME, SITE_HOME = Path("fedtailor-server"), Path("fedtailor-site")


def show(document: dict[str, Any], as_json: bool) -> bool:
    """Print ``document`` as one line of JSON if asked to; whether it was."""
    if as_json:
        print(json.dumps(document))
    return as_json


def table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Print a table, or a word that there is nothing to show."""
    if not rows:
        Console().print(f"{title}: none yet")
        return
    made = Table(*columns, title=title)
    for row in rows:
        made.add_row(*(_cell(value) for value in row))
    Console().print(made)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def log_to_stderr() -> None:
    """Daemons log one line per event; libraries only what is wrong."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("fedtailor").setLevel(logging.INFO)
    for noisy in ("flwr", "httpx", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
