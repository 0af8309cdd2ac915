"""``fedtailor simulate``: the same study, without a network."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fedtailor.cli.options import Json, show
from fedtailor.errors import ConfigError

if TYPE_CHECKING:
    from fedtailor.config import Experiment
    from fedtailor.simulations.composed import Simulated
    from fedtailor.simulations.setting import OnEvent

Overrides = Annotated[list[str] | None, typer.Argument(help="Hydra overrides: study=heart privacy=none rounds=50 …")]
Out = Annotated[
    Path | None, typer.Option(help="The run's folder; default: outputs/simulate/<study>, or outputs/sweep.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where a run of this folder was interrupted.")]
CHECKPOINT = "checkpoint.safetensors"  # in a run's folder, until its result is there
Multirun = Annotated[bool, typer.Option("--multirun", "-m", help="Run every combination of values with commas.")]

Launcher = Annotated[
    str, typer.Option(help="Where the runs of -m are done: local, one after the other; joblib, ray or submitit.")
]
Jobs = Annotated[int | None, typer.Option(min=1, help="Runs at once; default: as many as there are cores.")]
Submitit = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE", help="What a Slurm job asks for: timeout_min=120, slurm_partition=gpu, mem_gb=8 …"
    ),
]


def simulate(
    overrides: Overrides = None,
    out: Out = None,
    multirun: Multirun = False,
    resume: Resume = False,
    launcher: Launcher = "local",
    jobs: Jobs = None,
    submitit: Submitit = None,
    json: Json = False,
) -> None:
    """Simulate a study and write its run folder. The block engine's noise is seeded, for studying accuracy: nothing to release."""
    if multirun:
        from fedtailor.cli.launchers import Room, parsed
        from fedtailor.cli.sweep import sweep

        room = Room(jobs, out or Path("outputs") / "sweep", parsed(submitit or []))
        return sweep(overrides or [], resume, json, launcher, room)
    if launcher != "local" or jobs is not None or submitit:
        raise ConfigError("--launcher, --jobs and --submitit are for a sweep; add -m")
    from fedtailor.config import load
    from fedtailor.report import console_table
    from fedtailor.store import alone

    experiment = load(overrides or [])
    if resume and experiment.simulation.engine == "flower":
        raise ConfigError(
            "--resume: not with simulation.engine=flower, whose runtime keeps what it has in memory; begin anew without it, or "
            "simulation.engine=block"
        )
    folder = out or Path("outputs") / "simulate" / experiment.plan.study
    with alone(folder), progress() as shown:
        if (folder / CHECKPOINT).exists() and not resume:
            shown.console.print(f"{folder} holds an interrupted run, which this one replaces; --resume goes on with it")
        done = completed(experiment, folder, resume, followed(shown, experiment.plan.study, experiment))
    if not show(done.result.model_dump(mode="json", by_alias=True), json):
        Console().print(console_table(done.result))
        Console().print(f"run folder: {folder}")


def completed(experiment: "Experiment", folder: Path, resume: bool, on_event: "OnEvent") -> "Simulated":
    """Simulate and write the run folder. Its checkpoint goes when the result is there."""
    from fedtailor.simulations.composed import run

    done = run(experiment, on_event, folder / CHECKPOINT, resume)
    done.write(folder)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return done


def progress() -> Progress:
    """A bar on stderr that is gone when its work is done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[said]}"),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)


def followed(shown: Progress, name: str, experiment: "Experiment") -> "OnEvent":
    """Show the rounds of one simulation as they end: clients a second, and once a second what they have spent."""
    from fedtailor.card import at_most
    from fedtailor.simulations.composed import spent

    task = shown.add_task(f"simulating {name}", total=experiment.plan.rounds, said="")
    told, epsilon = -1.0, ""

    def on_event(event: dict[str, Any]) -> None:
        nonlocal told, epsilon
        if event.get("kind") == "round":
            if time.monotonic() - told > 1 and experiment.plan.privacy is not None:
                epsilon, told = f" ε {at_most(spent(experiment, event['round']))}", time.monotonic()
            rate = f"{event['clients'] / event['seconds']:,.0f} clients/s" if event.get("seconds") else ""
            shown.update(task, completed=event["round"], said=f"{rate}{epsilon}")
        if event.get("kind") == "path" and event["why"]:
            shown.console.print(f"clients are trained by {event['path']}, {event['block']} at once: {event['why']}")
        if event.get("kind") == "steps":
            shown.console.print(event["why"])

    return on_event
