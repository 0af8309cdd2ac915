"""``fedtailor server``: what an operator does."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedtailor.cli.options import SERVER_HOME, Json, ServerHome, log_to_stderr, show, table

app = typer.Typer(help="Run the coordinator, and studies on it.", no_args_is_help=True)
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Hydra overrides: study=heart rounds=50 strategy=fedprox …")
]


def ask(home: Path, method: str, request: dict[str, Any] | None = None) -> dict[str, Any]:
    """Ask the running coordinator of ``home``."""
    from fedtailor import control

    return control.call(control.socket_of(home), "Server", method, request)


@app.command()
def init(
    home: ServerHome = SERVER_HOME,
    name: Annotated[str, typer.Option(help="The consortium's name.")] = "consortium",
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The one public port.", min=1, max=65535)] = 8443,
    reach: Annotated[list[str] | None, typer.Option(help="A name or address that sites use; repeatable.")] = None,
    json: Json = False,
) -> None:
    """Make the consortium's CA, the server's certificate, and the key that signs plans."""
    from pydantic import ValidationError

    from fedtailor.config import readable
    from fedtailor.errors import ConfigError
    from fedtailor.server.home import Home, ServerConfig

    try:
        hosts = tuple(reach) if reach else ("localhost", "127.0.0.1")
        config = ServerConfig(name=name, host=host, port=port, hosts=hosts)
    except ValidationError as error:
        raise ConfigError(readable(error)) from error
    made = Home(home)
    made.init(config)
    if not show({"home": str(made.folder)}, json):
        Console().print(f"coordinator's home: {made.folder}; invite each site with: fedtailor server invite NAME")


@app.command()
def up(home: ServerHome = SERVER_HOME) -> None:
    """Run the coordinator in the foreground until Ctrl-C or SIGTERM; unfinished runs resume."""
    from fedtailor.server.coordinator import Coordinator

    log_to_stderr()
    Coordinator(home).up()


@app.command()
def submit(
    overrides: Overrides = None,
    home: ServerHome = SERVER_HOME,
    days: Annotated[float, typer.Option(help="For how many days sites may approve it.", min=0.01, max=365)] = 30.0,
    resume: Annotated[str | None, typer.Option(help="Take up a failed or stopped run again, by its name.")] = None,
    json: Json = False,
) -> None:
    """Propose a study to its sites. It begins when a quorum has agreed and the one before it has ended."""
    import yaml

    from fedtailor.config import load
    from fedtailor.errors import ConfigError
    from fedtailor.leaving import agreed
    from fedtailor.privacy.planning import resolve

    if resume:
        answer = ask(home, "Resume", {"run": resume})
    else:
        experiment = load(overrides or [])
        if experiment.simulation.population is not None:
            raise ConfigError(
                "population: its clients are simulated, and a deployment asks the plan's sites; leave it out"
            )
        plan = resolve(experiment.plan)
        config = yaml.safe_dump(plan.model_dump(mode="json", by_alias=True), sort_keys=False)
        leaves = agreed(plan.canonical()).model_dump_json()
        answer = ask(home, "Submit", {"plan": plan.canonical(), "config": config, "days": days, "leaves": leaves})
    if not show(answer, json):
        Console().print(
            f"proposed: {answer['run']}; follow it with: fedtailor server watch {answer['run']} --home {home}"
        )


@app.command()
def runs(home: ServerHome = SERVER_HOME, json: Json = False) -> None:
    """List all runs."""
    answer = ask(home, "Runs")
    if not show(answer, json):
        rows = [[r["run"], r["status"], f"{r['round']}/{r['rounds']}", r["detail"]] for r in answer["runs"]]
        table("runs", ["run", "status", "round", "detail"], rows)


@app.command()
def models(home: ServerHome = SERVER_HOME, json: Json = False) -> None:
    """List every model there is, and whose answers are in it."""
    answer = ask(home, "Models")
    if not show(answer, json):
        rows = [
            [r["run"], ", ".join(r["sites"]), ", ".join(r["withdrawn"]) or None, r["model"]] for r in answer["rows"]
        ]
        table("models", ["run", "contains", "withdrawn since", "file"], rows)


@app.command()
def retrain(
    run: str,
    without: Annotated[list[str], typer.Option(help="A site to leave out; repeatable.")],
    home: ServerHome = SERVER_HOME,
    json: Json = False,
) -> None:
    """Propose a run's plan again without a site, one that has withdrawn, say."""
    answer = ask(home, "Retrain", {"run": run, "without": without})
    if not show(answer, json):
        Console().print(f"proposed: {answer['run']}", highlight=False)


@app.command()
def status(home: ServerHome = SERVER_HOME, json: Json = False) -> None:
    """Show the coordinator's address and which sites are connected."""
    answer = ask(home, "Status")
    if not show(answer, json):
        rows = [[name, "connected" if online else "away"] for name, online in answer["sites"].items()]
        table(f"sites at {answer['address']}", ["site", "state"], rows)


@app.command()
def watch(run: str, home: ServerHome = SERVER_HOME, json: Json = False) -> None:
    """Follow a run until it ends; exit code 1 if it fails."""
    from fedtailor import control

    last: dict[str, Any] = {}
    for event in control.watch(control.socket_of(home), "Server", "Watch", {"run": run}):
        last = event
        if not show(event, json):
            Console().print(sentence(event), highlight=False)
    if last.get("kind") == "finished" and last.get("status") == "failed":
        raise typer.Exit(1)


def sentence(event: dict[str, Any]) -> str:
    """An event for people."""
    match event["kind"]:
        case "started":
            return f"{event['run']}: round {event['round']} of {event['rounds']} begins"
        case "proposal":
            code = event["code"]
            said = "agrees" if code is None else "has not decided yet" if code == "pending" else f"refuses ({code})"
            return f"  {event['site']}: {said}"
        case "reply" if event["code"]:
            return f"  {event['site']}: no reply that counts ({event['code']})"
        case "reply":
            return f"  {event['site']}: {event['bytes']} bytes, {event['seconds']} s of work"
        case "round":
            return f"round {event['round']} of {event['rounds']} closed in {event['seconds']:.2f} s"
        case "finished":
            return f"{event['run']}: {event['status']} {event.get('detail') or ''}".rstrip()
    return str(event)


@app.command()
def stop(run: str, home: ServerHome = SERVER_HOME, json: Json = False) -> None:
    """End a run early; what it has learnt so far is evaluated and kept."""
    answer = ask(home, "Stop", {"run": run})
    if not show(answer, json):
        Console().print(f"{answer['run']} is stopping")
