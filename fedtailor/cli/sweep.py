"""``fedtailor simulate … -m``: one run after the other, for every combination of the values that are listed."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from fedtailor.cli import compare
from fedtailor.cli.options import show
from fedtailor.cli.simulate import completed, followed, progress
from fedtailor.errors import FedtailorError

if TYPE_CHECKING:
    from fedtailor.config import Experiment


def sweep(overrides: Sequence[str], root: Path, resume: bool, json: bool) -> None:
    """Run all, each in a folder of its own under ``root``; exit code 1 if one failed, and the others went on.

    With ``resume`` a run that has its result is left as it is, and one that was interrupted goes on.
    """
    from fedtailor import config

    fixed, chosen = config.sweep(overrides)
    runs: list[dict[str, object]] = []
    with progress() as shown:
        task = shown.add_task("runs", total=len(chosen), said="")
        for each in chosen:
            folder = root / named(each or fixed)
            error = None
            try:
                if not resume:
                    (folder / "result.json").unlink(missing_ok=True)  # an earlier run's would pass for this one's
                experiment = config.load([*fixed, *each])
                if not done_before(folder, experiment):
                    (folder / "result.json").unlink(missing_ok=True)
                    completed(experiment, folder, resume, followed(shown, folder.name, experiment))
            except FedtailorError as failure:
                error = str(failure)
            except Exception as failure:  # what one combination breaks must not take the others along
                error = f"{type(failure).__name__}: {failure}"
            if error:
                shown.console.print(f"{folder.name} failed: {error}", markup=False, highlight=False, soft_wrap=True)
            runs.append({"folder": str(folder), "overrides": [*fixed, *each], "error": error})
            shown.advance(task)
    good = [Path(str(one["folder"])) for one in runs if not one["error"]]
    rows = compare.compared([compare.read(folder) for folder in dict.fromkeys(good)])
    if not show({"runs": runs, "rows": [row._asdict() for row in rows]}, json):
        if rows:
            Console().print(compare.shown(rows))
        Console().print(f"{len(good)} of {len(runs)} runs done; run folders: {root}", markup=False, highlight=False)
    if len(good) < len(runs):
        raise typer.Exit(1)


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
