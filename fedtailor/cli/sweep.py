"""``fedtailor simulate … -m``: a run for every combination of the values that are listed."""

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from fedtailor.cli import compare
from fedtailor.cli.launchers import LAUNCHERS, Room, Task
from fedtailor.cli.options import show
from fedtailor.cli.simulate import completed, followed, progress
from fedtailor.errors import ConfigError, FedtailorError

if TYPE_CHECKING:
    from fedtailor.config import Experiment
    from fedtailor.simulations.setting import OnEvent

    Follow = Callable[[str, Experiment], OnEvent]


def sweep(overrides: Sequence[str], resume: bool, json: bool, launcher: str, room: Room) -> None:
    """Run all, each in a folder of its own under ``room.root``; exit code 1 if one failed, and the others went on.

    With ``resume`` a run that has its result is left as it is, and one that was interrupted goes on.

    Raises:
        ConfigError: if the launcher is unknown, not installed or asked for what it has not.
    """
    from fedtailor import config

    if hydras := [one for one in overrides if re.match(r"[+~]*hydra[/.](launcher|sweeper|job)", one)]:
        raise ConfigError(f"{hydras[0]}: launchers are options here: --launcher joblib --jobs 4")
    if launcher not in LAUNCHERS:
        raise ConfigError(f"--launcher {launcher}: there is no such launcher; there are {', '.join(LAUNCHERS)}")
    if launcher == "local" and room.jobs not in (None, 1):
        raise ConfigError(f"--jobs {room.jobs}: local runs one after the other; add --launcher joblib")
    if launcher != "submitit" and room.asked:
        raise ConfigError(f"--submitit {next(iter(room.asked))}: is for --launcher submitit, this is {launcher}")
    fixed, chosen = config.sweep(overrides)
    listed = [Task([*fixed, *each], str(room.root / named(each or fixed)), resume) for each in chosen]
    tasks = {task.folder: task for task in listed}  # what is listed twice has one folder, and is run once
    errors = dict[str, str | None]()
    with progress() as shown:
        bar = shown.add_task("runs", total=len(tasks), said="")
        work = partial(ran, follow=partial(followed, shown)) if launcher == "local" else ran
        for folder, error in LAUNCHERS[launcher](work, list(tasks.values()), room):
            errors[folder] = error
            if error:
                name = Path(folder).name
                shown.console.print(f"{name} failed: {error}", markup=False, highlight=False, soft_wrap=True)
            shown.advance(bar)
    runs = [{"folder": one.folder, "overrides": one.overrides, "error": errors[one.folder]} for one in listed]
    good = [one for one in runs if not one["error"]]
    rows = compare.compared([compare.read(Path(folder)) for folder in tasks if not errors[folder]])
    if not show({"runs": runs, "rows": [row._asdict() for row in rows]}, json):
        if rows:
            Console().print(compare.shown(rows))
        Console().print(
            f"{len(good)} of {len(runs)} runs done; run folders: {room.root}", markup=False, highlight=False
        )
    if len(good) < len(runs):
        raise typer.Exit(1)


def ran(overrides: list[str], folder: str, resume: bool, follow: "Follow | None" = None) -> str | None:
    """Do one run, in whichever process: None, or why it failed. Strings in, a string out: libraries that pickle see no more.

    Args:
        follow: makes of a run's name and settings what is told of its rounds; None: nobody is.
    """
    from fedtailor import config, store

    path = Path(folder)
    try:
        with store.alone(path):
            if not resume:
                (path / "result.json").unlink(missing_ok=True)  # an earlier run's would pass for this one's
            experiment = config.load(overrides)
            if not done_before(path, experiment):
                (path / "result.json").unlink(missing_ok=True)
                completed(experiment, path, resume, follow(path.name, experiment) if follow else lambda event: None)
    except FedtailorError as failure:
        return str(failure)
    except Exception as failure:  # what one combination breaks must not take the others along
        return f"{type(failure).__name__}: {failure}"
    return None


def done_before(folder: Path, experiment: "Experiment") -> bool:
    """Whether a folder holds the result of this very plan, simulated with these very settings."""
    import yaml

    from fedtailor.result import Result
    from fedtailor.simulations.composed import resolved, told

    try:
        written = yaml.safe_load((folder / "config.yaml").read_text())
        result = Result.model_validate_json((folder / "result.json").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return False
    of = experiment.simulation.population
    same: bool = written == resolved(experiment).model_dump(mode="json", by_alias=True)
    return (
        same
        and (result.population is None if of is None else of.made(result.population))
        and result.simulation == told(experiment)
    )


def named(overrides: Sequence[str]) -> str:
    """A folder's name for some overrides: they themselves where a file name can hold them; different for different ones.

    >>> named(["rounds=5", "strategy=fedprox"]), named(["sites=[va,../x]"])
    ('rounds=5,strategy=fedprox', 'sites=_va,.._x_-1b3fe32c')
    """
    text = ",".join(overrides) or "defaults"
    name = re.sub(r"[^\w=.,+~-]+", "_", text, flags=re.ASCII)
    if name == text and len(name) <= 150 and not name.startswith((".", "-")):
        return name
    return f"{name[:140].lstrip('.-')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
