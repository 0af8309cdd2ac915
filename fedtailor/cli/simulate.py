"""``fedtailor simulate``: the same study, without a network."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fedtailor.cli.options import Json, show

Overrides = Annotated[list[str] | None, typer.Argument(help="Hydra overrides: study=heart privacy=none rounds=50 …")]
Out = Annotated[Path | None, typer.Option(help="The run's folder; default: outputs/simulate/<study>.")]


def simulate(overrides: Overrides = None, out: Out = None, json: Json = False) -> None:
    """Simulate a study and write its run folder. Its noise is seeded, for studying accuracy: nothing to release."""
    import yaml

    from fedtailor.config import build, load
    from fedtailor.privacy.planning import resolve
    from fedtailor.report import console_table, write_run
    from fedtailor.simulations import policies
    from fedtailor.simulations.run import simulate as run_study

    plan, simulation = load(overrides or [])
    plan = resolve(plan)
    sources: dict[str, Any] = build(simulation.data, dict)
    rules = None if simulation.policy is None else policies.read(simulation.policy, plan.sites)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"simulating {plan.study}", total=plan.rounds)

        def on_event(event: dict[str, Any]) -> None:
            if event.get("kind") == "round":
                progress.update(task, completed=event["round"])
            if event.get("kind") == "path" and event["why"]:
                progress.console.print(
                    f"clients are trained by {event['path']}, {event['block']} at once: {event['why']}"
                )

        result, params = run_study(
            plan,
            sources,
            block=simulation.block,
            path=simulation.path,
            policies=rules,
            step_s=simulation.step_s,
            on_event=on_event,
        )
    folder = out or Path("outputs") / "simulate" / plan.study
    config = yaml.safe_dump(plan.model_dump(mode="json", by_alias=True), sort_keys=False)
    write_run(folder, result=result, plan=plan, params=params, config_yaml=config)
    if not show(result.model_dump(mode="json", by_alias=True), json):
        Console().print(console_table(result))
        Console().print(f"run folder: {folder}")
