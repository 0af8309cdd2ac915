"""``fedtailor client``: what a site does."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedtailor.cli import audit
from fedtailor.cli.options import SITE_HOME, Json, SiteHome, log_to_stderr, show, table

app = typer.Typer(help="Run a site's daemon, and see what it does.", no_args_is_help=True)
app.add_typer(audit.app, name="audit")


def ask(home: Path, method: str, request: dict[str, Any] | None = None, timeout: float = 60.0) -> dict[str, Any]:
    """Ask the running daemon of ``home``."""
    from fedtailor import control

    return control.call(control.socket_of(home), "Site", method, request, timeout)


@app.command()
def join(
    kit: Annotated[Path, typer.Argument(help="The kit folder that the coordinator's operator handed over.")],
    data: Annotated[Path, typer.Option(help="The site's table, a CSV file.")],
    study: Annotated[list[str], typer.Option(help="A study that this site takes part in; repeatable.")],
    epsilon: Annotated[float, typer.Option(help="The most epsilon the data set may ever spend.", min=0)],
    delta: Annotated[float, typer.Option(help="The greatest delta.", min=0, max=0.1)] = 1e-4,
    home: SiteHome = SITE_HOME,
    json: Json = False,
) -> None:
    """Set this site up from a kit: keys, settings, and a policy of its own."""
    from fedtailor.client.setup import set_up

    config = set_up(home, kit, data=data, studies=study, epsilon=epsilon, delta=delta)
    if not show(config.model_dump(mode="json"), json):
        Console().print(
            f"{config.site} is set up in {home.resolve()}; read site.yaml, then: fedtailor client up --home {home}"
        )


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
