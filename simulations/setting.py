"""What stays the same in all rounds of a simulated study: who takes part, with which data, and how they are trained."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedtailor import recipe as recipes
from fedtailor import tree
from fedtailor.config import BlockPath, Precision, Rows, Steps, build
from fedtailor.errors import ConfigError
from fedtailor.optimizers import optimizer_of
from fedtailor.policy import Policy
from fedtailor.population import Population
from fedtailor.privacy.planning import Sampling, resolve, strategy_of
from fedtailor.recipe import Dataset, Recipe
from fedtailor.simulations.buffered import Clock, steps_within
from fedtailor.simulations.clients import Clients, deal, epsilon_of, fills_of, sampling_of, sites
from fedtailor.simulations.clients import population as virtual
from fedtailor.simulations.cohort import feed_from, prepared, with_rows
from fedtailor.simulations.compiled import replay_of
from fedtailor.simulations.crew import Duty
from fedtailor.simulations.devices import fleet
from fedtailor.simulations.hardware import across, device_of, given, home_of, home_of_rows, packed, placed, recipe_on
from fedtailor.simulations.natural import counted, read_with
from fedtailor.simulations.paths import Round, Task, Way, check_half, choose
from fedtailor.simulations.policies import Gate, admit
from fedtailor.simulations.spanned import SMALL
from fedtailor.simulations.standing import Standing
from fedtailor.simulations.traffic import Keep, counting
from fedtailor.sources import DataSource
from fedtailor.strategy import Strategy
from fedtailor.study import Plan
from fedtailor.tree import Params, Tree

TRIES = 100  # rounds until one asks somebody
OnEvent = Callable[[dict[str, Any]], None]


class Setting(NamedTuple):
    """A study that is ready to be simulated."""

    plan: Plan  # with the sites that agree and have rows
    whole: Plan  # with all of its sites
    recipe: Recipe  # whose models lie on the device
    strategy: Strategy
    data: dict[str, Dataset]  # of the plan's sites, in their order; on the device
    start: Params  # on the host
    gate: Gate | None
    empty: list[dict[str, Any]]  # an entry for each site without rows
    clients: Clients
    population: Population | None
    seconds: Tensor  # [K] virtual, of a round; of a population, none
    way: Way
    keep: Keep  # asks the gate what leaves, and counts its bytes in ``sent``
    sent: dict[str, int]
    together: bool  # whether nobody asks for one client's summand, and a sum in one go saves work
    device: torch.device  # that clients are trained on
    streamed: bool  # whether rows lie on the host and a block's come with it
    home: torch.device  # of the state
    precision: Precision
    steps: Steps

    def turn(self, round: int) -> Plan:
        """The plan with the sites whose turn it is."""
        return turn(self.plan, self.whole, round)

    def duty(self, threads: int) -> Duty:
        """What a process that trains some of the clients is told."""
        drawn = None if self.population is None else sampling_of(self.plan, self.population)
        asked = self.gate is not None or self.plan.buffer is not None or self.strategy.packed
        summed = self.strategy.reduce.is_sum and not asked
        whole = self.whole.canonical()
        how = (
            self.way.path,
            self.way.block,
            self.together,
            summed,
            threads,
            str(self.device),
            self.streamed,
            self.precision,
            self.steps,
        )
        return Duty(whole, drawn, *how)

    def begin(self) -> Standing:
        """Before the first round."""
        known = [] if self.population else list(range(len(self.plan.sites)))
        memory = tree.stack([tree.bare(self.strategy.remember(self.start)) for _ in known or [0]])
        memory = memory if known else tree.at(memory, slice(0, 0))
        state = placed(self.home, self.strategy.init(self.start))
        return Standing(0, state, memory, known, Clock(0.0), self.way.block)

    def resumed(self, at: Standing) -> Standing:
        """One that comes from a file, with all of it where it belongs."""
        coming = (one._replace(summand=placed(self.home, one.summand)) for one in at.clock.coming)
        return replace(at, state=placed(self.home, at.state), clock=at.clock._replace(coming=tuple(coming)))


def turn(plan: Plan, whole: Plan, round: int) -> Plan:
    """``plan`` with those of its sites that ``whole`` asks in this round."""
    asked = whole.asked(round)
    return plan.model_copy(update={"sites": tuple(site for site in plan.sites if site in asked)})


def prepare(
    plan: Plan,
    sources: Mapping[str, DataSource],
    *,
    block: int,
    path: BlockPath,
    policies: Mapping[str, Policy] | None,
    step_s: Mapping[str, float] | None,
    population: Population | None,
    device: str = "cpu",
    rows: Rows = "auto",
    precision: Precision = "float32",
    steps: Steps = "plain",
    on_event: OnEvent,
) -> Setting:
    """Ask the sites, prepare their data and choose how they are trained; see :func:`fedtailor.simulations.run.simulate`."""
    on = device_of(device)
    drawn = None if population is None else _fits(plan, population, policies)
    whole = resolve(plan, drawn)
    strategy = strategy_of(whole, sampling=drawn)  # of all its sites: a deployment divides by them too, whoever agrees
    epsilon_of(whole, whole.rounds, 1.0 if drawn is None else drawn.rate)  # if it has none, before anything is trained
    gate = None if policies is None else admit(whole, policies)
    recipe = build(whole.recipe, Recipe)
    agreed = whole if gate is None else gate.plan
    cells = list[str]()
    if population is not None and population.partition == "natural":
        data, cells = read_with(population.options.get("column"), agreed, recipe, sources)
    else:
        data = prepared(agreed, recipe, sources)
    plan, empty = with_rows(agreed, data)
    start = recipes.initial(recipe, plan.seed)
    cast = strategy.broadcast(strategy.init(start))
    speeds = torch.tensor([(step_s or {}).get(site, 1.0) for site in plan.sites])
    taken = steps_within(plan, speeds)
    live = (torch.arange(plan.local.steps) < taken[:, None]).float()
    clients = sites(plan, lambda round: turn(plan, whole, round), data, live)
    if population is not None:
        dealt = deal(torch.cat([one.train.y for one in data.values()]), population, plan.seed, cells)
        if population.partition == "natural":
            population = counted(population, len(set(cells)))
            _counts(plan, population)
        clients = virtual(plan, dealt, population, fleet(plan, population, strategy, start))
    lie = home_of_rows(rows, on, data)
    table, data = packed(data, lie)
    streamed = table if rows == "host" or lie != on else None
    recipe, home = recipe_on(recipe, on), home_of(plan, strategy, on)
    feed = feed_from(plan, None if streamed else table, placed(on, strategy.start(cast, strategy.remember(start))))
    large = clients.many * sum(p.numel() for p in start.values()) >= SMALL  # else a sum in one go saves nothing
    together = gate is None and plan.buffer is None and large
    clip = None if plan.record is None else plan.record.clip
    task = Task(recipe, strategy, plan.local.lr, clip, feed, block, together)._replace(half=precision == "bf16")
    replay = replay_of(steps, on, feed, lambda why: on_event({"kind": "steps", "why": why}))
    task = task._replace(replay=replay, optimizer=optimizer_of(plan.local))
    trial = next((r for r in range(TRIES) if clients.asked(r)), None)
    if trial is None:
        raise ConfigError(
            f"population.cohort: nobody is asked in {TRIES} rounds; ask more clients, or deal rows to all"
        )
    first = Round(
        cast,
        tree.stack([strategy.remember(start)] * len(clients.asked(trial))),
        *clients.fed(trial, clients.asked(trial)),
    )
    trial_round = Round(*given(on, *first, streamed))
    way = choose(path, task, trial_round)
    if task.half:
        check_half(way, trial_round)
    on_event({"kind": "path", "path": way.path, "block": way.block, "why": way.why, "seconds": way.seconds})

    def admitted(summands: Tree, first: int, round: int) -> Tensor | None:
        return None if gate is None else gate._replace(plan=turn(plan, whole, round)).keep(summands, first, round)

    keep, sent = counting(plan, strategy, start, admitted, lambda round: turn(plan, whole, round).sites)
    if population is not None:  # whose clients' bytes nobody counts
        keep, sent = (lambda summands, first, round: None), dict.fromkeys(plan.sites, 0)
    return Setting(
        plan,
        whole,
        recipe,
        strategy,
        data,
        start,
        gate,
        empty,
        clients,
        population,
        taken * speeds,
        way._replace(many=across(way.many, on, home, streamed)),
        keep,
        sent,
        together,
        on,
        streamed is not None,
        home,
        precision,
        steps,
    )


def _fits(plan: Plan, population: Population, policies: Mapping[str, Policy] | None) -> Sampling:
    """What the accountant is told of a population.

    Raises:
        ConfigError: if the plan or the rules are for sites, not for clients.
    """
    if policies is not None:
        raise ConfigError("simulation.policy: is a site's, and the clients of a population are no sites; use null")
    if plan.buffer is not None and not population.timed:
        raise ConfigError(
            "buffer: the population has no clock; give population.step_s or population.devices, or use null"
        )
    if plan.site is not None and population.availability is not None:
        raise ConfigError(
            "population.availability: with privacy.unit=site rounds must be secret Poisson samples of all clients, and who "
            "is there is no secret; use null, or another privacy"
        )
    if plan.buffer is None and population.answers is not None:
        raise ConfigError(
            f"population.answers: {population.answers}, but the plan's rounds wait for the cohort; give buffer.answers too, "
            "or use null"
        )
    if plan.local.within_s is not None and not population.timed:
        raise ConfigError(
            "local.within_s: the population has no clock; give population.step_s or population.devices, or use null"
        )
    if population.clients is not None:
        _counts(plan, population)
    return sampling_of(plan, population)


def _counts(plan: Plan, population: Population) -> None:
    """Raise a ConfigError if the strategy goes by another number of clients than there are, or a round by more."""
    if plan.buffer is not None and fills_of(plan, population) > population.many:
        raise ConfigError(
            f"population.answers: {fills_of(plan, population)} answers close a round, more than all {population.many} "
            f"clients; give population.answers={population.many}, or less"
        )
    inside, name = plan.strategy.model_extra, "strategy"
    while isinstance(inside, dict):  # a strategy may wrap another
        told = inside.get("population")
        if told is not None and told != population.many:
            raise ConfigError(
                f"{name}.population: {told}, but there are {population.many} clients; give {name}.population="
                f"{population.many}"
            )
        inside, name = inside.get("of"), f"{name}.of"
