"""``fedtailor client``: what a site does."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedtailor.cli import audit
from fedtailor.cli.options import SITE_HOME, Json, SiteHome, log_to_stderr, show, table
from fedtailor.errors import ConfigError

app = typer.Typer(help="Run a site's daemon, and see what it does.", no_args_is_help=True)
app.add_typer(audit.app, name="audit")


def ask(home: Path, method: str, request: dict[str, Any] | None = None, timeout: float = 60.0) -> dict[str, Any]:
    """Ask the running daemon of ``home``."""
    from fedtailor import control

    return control.call(control.socket_of(home), "Site", method, request, timeout)


@app.command()
def join(
    url: Annotated[
        str | None, typer.Argument(help="https://name:port of the coordinator; default: the invitation's.")
    ] = None,
    invitation: Annotated[
        Path | None, typer.Option(help="The file that the operator handed over; - to paste its text.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The site's table, a CSV file.")] = None,
    study: Annotated[list[str] | None, typer.Option(help="A study that this site takes part in; repeatable.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="The most epsilon the data set may ever spend.", min=0)] = None,
    delta: Annotated[float, typer.Option(help="The greatest delta.", min=0, max=0.1)] = 1e-4,
    new_key: Annotated[bool, typer.Option("--new-key", help="Make a new key: after a revocation, say.")] = False,
    wait: Annotated[bool, typer.Option(help="Wait until the operator approves; run it again to come back.")] = True,
    home: SiteHome = SITE_HOME,
    json: Json = False,
) -> None:
    """Join a consortium: make this site's key, ask for its certificate, and write settings and a policy of its own.

    A site that is set up already, and whose certificate has expired or was revoked, joins anew with a fresh invitation
    and without --data, --study and --epsilon: its settings, its policy and its ledger stay.
    """
    from fedtailor.client import joining

    progress = Console(stderr=True, soft_wrap=True)

    def say(it: joining.Joining) -> None:
        progress.print(
            f"this site's key:      {it.fingerprint}\nthe consortium's CA:  {it.ca_fingerprint}\n"
            f"compare both with the operator of {it.server} by telephone, who then runs: fedtailor server approve "
            f"{it.invitation.site}",
            highlight=False,
        )

    settings = None
    if data is not None and study and epsilon is not None:
        settings = joining.Settings(data, study, epsilon, delta)
    elif data is not None or study or epsilon is not None:
        raise ConfigError("--data, --study and --epsilon go together")
    text = None if invitation is None else _read_invitation(invitation)
    server = None if url is None else joining.address(url)
    with progress.status("waiting for the operator's approval; Ctrl-C leaves, and running it again comes back"):
        config = joining.join(home, text, settings, server=server, new_key=new_key, wait=wait, say=say)
    if config is None:
        if not show({"status": "waiting", "home": str(home.resolve())}, json):
            Console().print(f"asked; come back with: fedtailor client join --home {home}")
    elif not show({"status": "admitted"} | config.model_dump(mode="json"), json):
        Console().print(
            f"{config.site} is set up in {home.resolve()}; read site.yaml, then: fedtailor client up --home {home}"
        )


def _read_invitation(path: Path) -> str:
    from fedtailor.invitation import END

    try:
        if str(path) == "-":
            lines = []
            for line in sys.stdin:
                lines.append(line)
                if END in line:
                    break
            return "".join(lines)
        return path.read_text(encoding="ascii", errors="replace")
    except OSError as error:
        raise ConfigError(f"--invitation {path} cannot be read: {error.strerror}") from error


@app.command()
def up(home: SiteHome = SITE_HOME) -> None:
    """Run the site's daemon in the foreground until Ctrl-C or SIGTERM. It makes outbound connections only."""
    from fedtailor.client.daemon import Daemon

    log_to_stderr()
    Daemon(home).up()


@app.command()
def status(home: SiteHome = SITE_HOME, json: Json = False) -> None:
    """Show study, round, epsilon spent and left, and bytes sent."""
    from fedtailor.client.confine import Confinement

    answer = ask(home, "Status")
    if not show(answer, json):
        budget = answer["epsilon"]
        rows = [
            ["coordinator", f"{answer['server']} ({'connected' if answer['connected'] else 'away'})"],
            ["study", answer["study"]],
            ["round", f"{answer['round']} of {answer.get('rounds')}" if answer["study"] else None],
            [
                "epsilon spent",
                f"{budget['spent']:.3f} of {budget['cap']} (per {budget['unit']}, delta {budget['delta']})",
            ],
            ["epsilon left", budget["left"]],
            ["bytes sent", answer["bytes_sent"]],
            ["certificate until", answer["certificate_until"]],
            ["last problem", answer["last_error"]],
            *([f"worker: {name}", text] for name, text in Confinement(**answer["confinement"] or {}).rows()),
        ]
        table(answer["site"], ["", ""], rows)


@app.command()
def ledger(home: SiteHome = SITE_HOME, json: Json = False) -> None:
    """Show what each data set has spent, on which runs, and what is left."""
    from fedtailor.client.statement import sentences

    answer = ask(home, "Ledger")
    if not show(answer, json):
        Console(soft_wrap=True).print("\n".join(sentences(answer)), highlight=False, markup=False)


@app.command()
def egress(home: SiteHome = SITE_HOME, json: Json = False) -> None:
    """Show everything that has left this site."""
    answer = ask(home, "Egress")
    if not show(answer, json):
        keys = ["time", "run", "round", "bytes", "epsilon", "metrics", "refused"]
        table("egress", keys, [[row.get(key) for key in keys] for row in answer["rows"]])
