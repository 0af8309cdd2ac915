"""The ``fedtailor`` command. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 refused by policy or budget."""

import json
import sys

import typer
from rich.console import Console

from fedtailor.cli import approval, client, compare, demo, doctor, plugins, roster, server, simulate
from fedtailor.errors import ConfigError, FedtailorError, RefusedError

app = typer.Typer(
    help="Tailor a model together, with data that stay where they lie.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (roster.invite, roster.sites, roster.approve, roster.deny, roster.revoke):
    server.app.command()(command)
app.add_typer(server.app, name="server")
app.add_typer(client.app, name="client")
approval.add_to(client.app)
client.app.command()(doctor.doctor)
app.command("simulate")(simulate.simulate)
app.command("compare")(compare.compare)
app.command("demo")(demo.demo)
app.command("plugins")(plugins.plugins)


def main() -> None:
    """Run a command; an error that a person can mend ends in one sentence, never in a traceback."""
    try:
        app(standalone_mode=True)
    except FedtailorError as error:
        if "--json" in sys.argv:
            print(json.dumps({"error": error.code, "text": str(error)}))
        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/] ({error.code}):", style="", end=" ")
        Console(stderr=True, soft_wrap=True).print(str(error), markup=False, highlight=False)
        raise SystemExit(code_of(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def code_of(error: FedtailorError) -> int:
    """The exit code of an error."""
    if isinstance(error, RefusedError):
        return 3
    return 2 if isinstance(error, ConfigError) else 1
