"""``fedtailor client doctor``: is this host ready, and if not, what to mend."""

import logging
from typing import Annotated

import typer
from rich.console import Console

from fedtailor.cli.options import SITE_HOME, Json, SiteHome, show

COLOURS = {"ok": "green", "warning": "yellow", "wrong": "bold red"}


def doctor(
    recipe: Annotated[
        str | None, typer.Option(help="An installed recipe to hold the data against; default: the newest plan's.")
    ] = None,
    home: SiteHome = SITE_HOME,
    json: Json = False,
) -> None:
    """Check this site's settings, keys, connection, clock, host, records and data. Exit code 1 if something is wrong.

    It works with the daemon up or down, and sends nothing but a TLS handshake and GET /health.
    """
    logging.getLogger("fedtailor").addHandler(logging.NullHandler())  # the rows say it
    from fedtailor.client.doctor import examine

    with Console(stderr=True).status("looking; the training process takes some seconds to start"):
        rows = examine(home, recipe)
    wrong = sum(row.state == "wrong" for row in rows)
    if not show({"ok": not wrong, "rows": [row._asdict() for row in rows]}, json):
        out = Console(soft_wrap=True, highlight=False)
        for row in rows:
            out.print(f"{row.state:<8}", style=COLOURS[row.state], end="")
            out.print(f"{row.name:<12} {row.found}", markup=False)
            if row.mend:
                out.print(f"{'':<21}to mend: {row.mend}", markup=False)
        warned = sum(row.state == "warning" for row in rows)
        out.print(f"{len(rows)} checks: {wrong} wrong, {warned} to look at")
    if wrong:
        raise typer.Exit(1)
