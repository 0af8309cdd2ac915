"""``fedtailor simulate … -m``: one run after the other, for every combination of the values that are listed."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console

from fedtailor.cli import compare
from fedtailor.cli.options import show
from fedtailor.cli.simulate import followed, progress
from fedtailor.errors import FedtailorError


def sweep(overrides: Sequence[str], root: Path, json: bool) -> None:
    """Run all, each in a folder of its own under ``root``; exit code 1 if one failed, and the others went on."""
    from fedtailor import config
    from fedtailor.simulations.composed import run

    fixed, chosen = config.sweep(overrides)
    runs: list[dict[str, object]] = []
    with progress() as shown:
        task = shown.add_task("runs", total=len(chosen))
        for each in chosen:
            folder = root / named(each or fixed)
            error = None
            try:
                (folder / "result.json").unlink(missing_ok=True)  # an earlier run's would pass for this one's
                experiment = config.load([*fixed, *each])
                run(experiment, followed(shown, folder.name, experiment.plan.rounds)).write(folder)
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
