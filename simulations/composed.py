"""A study from its settings to its result, as the command line composes it: for notebooks, scripts and sweeps."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

from fedtailor import heap, store
from fedtailor.config import Experiment, build, groups, load
from fedtailor.errors import ConfigError
from fedtailor.privacy.planning import resolve
from fedtailor.report import write_run
from fedtailor.result import Result
from fedtailor.simulations import flower_engine, policies, traces
from fedtailor.simulations.clients import epsilon_of, sampling_of
from fedtailor.simulations.hardware import keep_pages
from fedtailor.simulations.run import simulate as run_study
from fedtailor.simulations.setting import OnEvent
from fedtailor.study import Plan
from fedtailor.tree import Params


class Simulated(NamedTuple):
    """A simulated study: what ``result.json`` says, the model's parameters by name, and the plan that was run."""

    result: Result
    params: Params
    plan: Plan

    def write(self, folder: Path | str) -> None:
        """Write the run folder; see :func:`fedtailor.report.write_run`."""
        import yaml

        text = yaml.safe_dump(self.plan.model_dump(mode="json", by_alias=True), sort_keys=False)
        write_run(Path(folder), result=self.result, plan=self.plan, model=self.params, config_yaml=text)


def simulate(study: str = "heart", settings: Mapping[str, Any] | None = None, **more: Any) -> Simulated:
    """Simulate a study in this process, like ``fedtailor simulate study=… KEY=VALUE…``, and write nothing.

    ``simulate("heart", {"strategy.mu": 0.1}, strategy="fedprox", rounds=5, privacy=None, local={"lr": 0.1})``

    Args:
        settings: any setting by its name on the command line, dots and all; they come after ``more``.
        more: settings whose names are words. None chooses none. In a mapping for a config group (``strategy=``,
            ``privacy=``) each entry is one setting; in any other it changes what the mapping names.

    Raises:
        ConfigError: naming a setting that is unknown, out of range or of a kind that no setting has.
        RefusedError: if the sites' rules, where ``simulation.policy`` names some, leave fewer sites than the quorum.
        ContractError: if data do not satisfy the contract.
    """
    return run(load(overrides_of({"study": study} | more | dict(settings or {}))))


def run(
    experiment: Experiment,
    on_event: OnEvent = lambda event: None,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> Simulated:
    """Simulate a composed study; raises what :func:`simulate` does.

    Args:
        checkpoint: where to write how far it is. ``simulation.engine=flower`` writes none.
        resume: go on from there.
    """
    simulation, plan, said = experiment.simulation, resolved(experiment), told(experiment)
    if simulation.engine == "flower":
        result, params = flower_engine.simulate(plan, simulation, on_event)
        return Simulated(result.model_copy(update={"simulation": said}), params, plan)
    sources: dict[str, Any] = build(simulation.data, dict)
    rules = None if simulation.policy is None else policies.read(simulation.policy, plan.sites)
    with _set_up(simulation.threads):
        result, params = run_study(
            plan,
            sources,
            block=simulation.block,
            path=simulation.path,
            policies=rules,
            step_s=simulation.step_s,
            population=simulation.population,
            workers=simulation.workers,
            device=simulation.device,
            rows=simulation.rows,
            precision=simulation.precision,
            steps=simulation.steps,
            ray=simulation.ray,
            gpus=simulation.gpus,
            checkpoint=checkpoint,
            every_s=simulation.checkpoint_s,
            resume=resume,
            on_event=on_event,
        )
    return Simulated(result.model_copy(update={"simulation": said}), params, plan)


def told(experiment: Experiment) -> dict[str, Any]:
    """What ``result.json`` says of a simulation, beside its plan and population: where data come from, rules and clock.

    And its precision, where it is not float32.
    """
    simulation = experiment.simulation
    said: dict[str, Any] = simulation.model_dump(mode="json", by_alias=True, include={"data", "step_s"})
    if simulation.precision != "float32":
        said["precision"] = simulation.precision
    if simulation.engine != "block":  # its noise is not what the seed says
        said["engine"] = simulation.engine
    if simulation.policy is not None:
        said["policy"] = {"path": str(simulation.policy), "sha256": store.digest(simulation.policy)}
    if simulation.population is not None and (found := traces.prints(simulation.population)):
        said["traces"] = found
    return said


@contextmanager
def _set_up(threads: int | None) -> Iterator[None]:
    """This process for a simulation."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    keep_pages()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        heap.trim()


def resolved(experiment: Experiment) -> Plan:
    """The plan with all that its privacy leaves open filled in."""
    plan, population = experiment.plan, experiment.simulation.population
    return resolve(plan, None if population is None else sampling_of(plan, population))


def spent(experiment: Experiment, rounds: int) -> float:
    """The epsilon of the first ``rounds`` rounds, for whoever was asked in each; 0 without privacy."""
    plan, population = resolved(experiment), experiment.simulation.population
    rate = 1.0 if population is None else sampling_of(plan, population).rate
    return epsilon_of(plan, rounds, rate) or 0.0


def overrides_of(settings: Mapping[str, Any]) -> list[str]:
    """Settings as Hydra overrides, in order.

    >>> overrides_of({"privacy": None, "strategy": {"mu": 0.1, "of": {"name": "topk"}}, "sites": ["a", "b"]})
    ['privacy=none', 'strategy.mu=0.1', "++strategy.of={name: 'topk'}", "sites=['a', 'b']"]

    Raises:
        ConfigError: naming a setting whose value is neither word, number, truth value, None, list nor mapping.
    """
    found = []
    for key, value in settings.items():
        if key in groups() and isinstance(value, Mapping):
            found += [f"{'++' if isinstance(v, Mapping) else ''}{key}.{k}={_literal(key, v)}" for k, v in value.items()]
        elif key in groups():  # a choice is a word, and YAML's null is the choice "none"
            found.append(f"{key}={'none' if value is None else value}")
        else:
            found.append(f"{key}={_literal(key, value)}")
    return found


_BEFORE_QUOTE = re.compile(r"(\\*)('|\Z)")  # Hydra takes a backslash for one unless a quote follows


def _doubled(found: re.Match[str]) -> str:
    return 2 * found[1] + ("\\'" if found[2] else "")


def _literal(key: str, value: Any) -> str:
    """A value in Hydra's grammar."""
    match value:
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case Integral():
            return str(int(value))
        case Real():
            return repr(float(value))
        case str() | Path():
            return f"'{re.sub(_BEFORE_QUOTE, _doubled, str(value))}'"
        case Mapping():
            return "{{{}}}".format(", ".join(f"{k}: {_literal(key, v)}" for k, v in value.items()))
        case list() | tuple():
            return f"[{', '.join(_literal(key, v) for v in value)}]"
    raise ConfigError(f"{key}: a {type(value).__name__} is not a setting; words, numbers, lists and mappings are")
