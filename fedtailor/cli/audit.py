"""``fedtailor client audit``: what a site's signed records say, and whether they hold."""

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from fedtailor.cli.options import SITE_HOME, Json, SiteHome, show, table
from fedtailor.errors import ConfigError, StoreError

app = typer.Typer(help="See who did what here, verify it, and export it.", no_args_is_help=True)
Since = Annotated[str | None, typer.Option(help="A date or time in UTC: 2026-01-31 or 2026-01-31T12:00.")]


@app.command("show")
def show_log(home: SiteHome = SITE_HOME, since: Since = None, json: Json = False) -> None:
    """Show who did what, oldest first."""
    from fedtailor.client import chain
    from fedtailor.client.site import Home

    rows = [row for row in chain.rows(Home(home).state / "audit.jsonl") if row["time"] >= _moment(since)]
    if not show({"rows": rows}, json):
        cells = [[row.pop("time"), row.pop("who", "-"), row.pop("what", "-"), _facts(row)] for row in rows]
        table("audit log", ["time", "who", "what", "facts"], cells)


@app.command()
def verify(
    home: SiteHome = SITE_HOME,
    earlier: Annotated[Path | None, typer.Option(help="An earlier export; it must be a prefix.")] = None,
    head: Annotated[list[str] | None, typer.Option(help="LOG:NUMBER:HASH, noted earlier; repeatable.")] = None,
    accept: Annotated[list[str] | None, typer.Option(help="LOG:NUMBER, a known loss of the key; repeatable.")] = None,
    json: Json = False,
) -> None:
    """Verify every record and signature; exit code 1 if one does not hold. The daemon may run or not."""
    from fedtailor.client import verify_audit
    from fedtailor.client.audit import gather
    from fedtailor.client.site import Home

    config = Home(home).config()
    try:
        before = verify_audit.load(earlier) if earlier else None
        ca = (config.keys / "ca.pem").read_bytes()
        wrong, notes = verify_audit.examine(
            gather(Home(home), config), earlier=before, heads=head or [], ca=ca, accept=accept or []
        )
    except (OSError, *verify_audit.MALFORMED) as error:
        raise StoreError(f"it cannot be verified: {type(error).__name__}: {error}") from error
    if not show({"wrong": wrong, "notes": notes}, json):
        verify_audit.tell(config.site, wrong, notes)
    if wrong:
        raise typer.Exit(1)


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="Where to write it; JSON, readable by its owner only.")],
    home: SiteHome = SITE_HOME,
    json: Json = False,
) -> None:
    """Write audit log, egress log, ledger and certificate to one file, for: python verify_audit.py FILE"""
    from fedtailor import store
    from fedtailor.client.audit import gather
    from fedtailor.client.site import Home

    gathered = gather(Home(home), Home(home).config())
    store.write_json(file, gathered)
    counts = {log: len(gathered[log]) for log in ("audit", "egress", "ledger")}
    if not show({"file": str(file), **counts}, json):
        print(f"{file}: " + ", ".join(f"{count} records of the {log}" for log, count in counts.items()))


def _facts(row: dict[str, Any]) -> str:
    return "  ".join(
        f"{name}={value if len(str(value)) <= 40 else str(value)[:12] + '…'}" for name, value in row.items()
    )


def _moment(since: str | None) -> str:
    try:
        return datetime.fromisoformat(since).isoformat() if since else ""
    except ValueError as error:
        raise ConfigError(f"--since {since}: not a date or time like 2026-01-31 or 2026-01-31T12:00") from error
