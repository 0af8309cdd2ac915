"""``fedtailor server invite | sites | approve | deny | revoke``: who may take part. They work with the daemon up or down."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedtailor.cli.options import SERVER_HOME, Json, ServerHome, show, table

Name = Annotated[str, typer.Argument(metavar="NAME", help="The site's name.")]


def invite(
    name: Name,
    hours: Annotated[float, typer.Option(help="How long the invitation holds.", min=0.01, max=24 * 365)] = 72.0,
    out: Annotated[Path | None, typer.Option(help="Where to write it; default: invitations/ of the home.")] = None,
    home: ServerHome = SERVER_HOME,
    json: Json = False,
) -> None:
    """Invite a site to join: writes one secret block of text, for one key, that expires."""
    from fedtailor import store
    from fedtailor.server import roster
    from fedtailor.server.home import Home

    it = Home(home)
    made = roster.invite(it, name, hours)
    path = (out or roster.block(it, name)).resolve()
    store.write_text(path, made.text())
    document = {"site": name, "invitation": str(path), "server": made.server, "expires": made.ends}
    if not show(document, json):
        Console(soft_wrap=True).print(
            f"invitation of {name} until {_when(made.ends)}: {path}\nhand it over on a safe way; the site's people "
            f"then run: fedtailor client join https://{made.server} --invitation FILE …",
            highlight=False,
        )


def sites(home: ServerHome = SERVER_HOME, json: Json = False) -> None:
    """List every site: invited, waiting with its fingerprint, admitted or revoked; connected or away."""
    from fedtailor import pki
    from fedtailor.cli.server import ask
    from fedtailor.errors import ConnectionFailed
    from fedtailor.server import roster
    from fedtailor.server.home import Home

    it = Home(home)
    it.config()  # says so where there is no home
    try:
        connected = ask(home, "Status")["sites"]
    except ConnectionFailed:
        connected = {}
    rows = roster.rows(it)
    ca = pki.fingerprint(pki.read_certificate((it.tls / "ca.pem").read_text()))
    document = {"sites": [row._asdict() | {"connected": connected.get(row.site)} for row in rows], "ca": ca}
    if not show(document, json):
        words = {True: "connected", False: "away", None: None}
        shown = [[r.site, r.state, words[connected.get(r.site)], _when(r.until), r.fingerprint] for r in rows]
        table("sites", ["site", "state", "", "until", "fingerprint of its key"], shown)
        Console(soft_wrap=True).print(f"the consortium's CA: {ca}", highlight=False)


def approve(
    name: Name,
    fingerprint: Annotated[str | None, typer.Option(help="As the site's people read it to you.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; for scripts.")] = False,
    home: ServerHome = SERVER_HOME,
    json: Json = False,
) -> None:
    """Sign the certificate that a waiting site has asked for."""
    from fedtailor.errors import ConfigError
    from fedtailor.server import roster
    from fedtailor.server.home import Home

    it = Home(home)
    waiting = next((row for row in roster.rows(it) if row.site == name and row.state == "waiting"), None)
    if fingerprint is None and waiting is not None:
        if json and not yes:
            raise ConfigError("--fingerprint or --yes is needed with --json, which asks no question")
        if not yes:
            typer.echo(f"the key of {name} has the fingerprint\n  {waiting.fingerprint}")
            typer.confirm("do the site's people read the same?", abort=True)
        fingerprint = waiting.fingerprint  # what was shown is what is signed
    row = roster.approve(it, name, fingerprint)
    if not show(row._asdict(), json):
        Console(soft_wrap=True).print(f"{name} is admitted; its certificate holds until {_when(row.until)}")


def deny(name: Name, home: ServerHome = SERVER_HOME, json: Json = False) -> None:
    """Withdraw a site's invitation and forget what it asked."""
    from fedtailor.server import roster
    from fedtailor.server.home import Home

    roster.deny(Home(home), name)
    if not show({"site": name, "state": "denied"}, json):
        Console().print(f"{name} is not invited any more")


def revoke(name: Name, home: ServerHome = SERVER_HOME, json: Json = False) -> None:
    """Shut an admitted site out, at once and for good; it can be invited anew, with a new key."""
    from fedtailor.server import roster
    from fedtailor.server.home import Home

    roster.revoke(Home(home), name)
    if not show({"site": name, "state": "revoked"}, json):
        Console().print(f"{name} is revoked: its next request is refused")


def _when(seconds: float | None) -> str | None:
    return None if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
