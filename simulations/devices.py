"""Virtual devices: how long a client of a population takes, whether it answers, and how long its round lasts."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedtailor import seeds
from fedtailor.errors import ConfigError
from fedtailor.population import Population
from fedtailor.simulations.buffered import steps_within
from fedtailor.simulations.draws import There, everybody, there
from fedtailor.simulations.traces import Capacity, Presence, capacity, presence, shuffled
from fedtailor.simulations.traffic import lengths
from fedtailor.strategy import Strategy
from fedtailor.study import Plan
from fedtailor.tree import Params

WAKES = 100  # times that somebody comes until one of them can be asked


class Trips(NamedTuple):
    """What becomes of some clients that are asked, in their order."""

    taken: Tensor  # [K] local steps
    seconds: Tensor | None  # [K] virtual, from being asked to the answer; None: there is no clock
    lost: Tensor  # [K] whether no answer comes


class Answers(NamedTuple):
    """Who of those that were asked answers in time."""

    clients: list[int]
    taken: Tensor  # [K] local steps of each
    lasts: float | None  # virtual seconds of the round; None without a clock


Trip = Callable[[int, Sequence[int], float], Trips]  # round, clients, the virtual second in which they are asked


class Fleet(NamedTuple):
    """The devices that traces tell of; nothing, where speeds are drawn."""

    capacity: Capacity | None = None
    presence: Presence | None = None
    down: int = 0  # bytes that a client is sent
    up: int = 0  # and sends

    def here(self, clients: int, now: float) -> There:
        """Those of a population who can be asked."""
        if self.presence is None:
            return everybody(clients)
        return there(clients, np.flatnonzero(self.presence.at(now)), len(self.presence.period))

    def wakes(self, now: float) -> float:
        """The next second in which there may be more of them; infinity where there never are."""
        return math.inf if self.presence is None else self.presence.wakes(now)

    def begins(self, clients: int, now: float) -> tuple[There, float]:
        """Who can be asked, and when: now, or when the first of them comes."""
        here = self.here(clients, now)
        for _ in range(WAKES):
            if here.many or math.isinf(self.wakes(now)):
                break
            now = self.wakes(now)
            here = self.here(clients, now)
        return here, now


def fleet(plan: Plan, of: Population, strategy: Strategy, start: Params) -> Fleet:
    """Read the traces that a population names.

    Raises:
        ConfigError: naming what is wrong in one, or a line's speed where the answers' lengths are known too late.
    """
    can = None if of.devices is None else capacity(of.devices)
    when = None if of.availability is None else presence(of.availability)
    if can is not None and can.up_kbps is not None and strategy.packed:
        raise ConfigError(
            "population.devices: the file has up_kbps, and how long this strategy's packed answers are is known when they "
            "are made, not when their clients begin; use a file without, or a strategy whose answers are not packed"
        )
    if can is not None:
        can = can.of(shuffled(plan.seed, "devices", len(can.pace), of.many))
    if when is not None:
        when = when.of(shuffled(plan.seed, "availability", len(when.period), of.many))
    return Fleet(can, when, *((0, 0) if can is None else lengths(plan, strategy, start)))


def trips(
    plan: Plan,
    of: Population,
    round: int,
    asked: Sequence[int],
    now: float = 0.0,
    fleet: Fleet = Fleet(),  # noqa: B008  # a value that nothing changes
    rows: Sequence[int] = (),
) -> Trips:
    """A device keeps its speed, and is lost in a round by a draw of its own, or because it goes before it is done.

    One that is too slow for ``local.within_s`` takes fewer steps.

    Args:
        now: the virtual second in which they are asked.
        rows: how many each has, where devices' speeds are by the example.
    """
    lost = torch.tensor(
        [seeds.number(plan.seed, "dropout", round, k) < of.dropout * 2**63 for k in asked], dtype=torch.bool
    )
    if not of.timed:
        return Trips(torch.full((len(asked),), float(plan.local.steps)), None, lost)
    speeds, lines = _paces(plan, of, asked, fleet, rows)
    taken = steps_within(plan, speeds)
    seconds = taken * speeds + lines
    if fleet.presence is not None:
        count = len(fleet.presence.period)
        left = torch.tensor([fleet.presence.left(k % count, now) for k in asked], dtype=torch.double)
        lost = lost | (seconds > left)
    return Trips(taken, seconds, lost)


def answers(plan: Plan, asked: Sequence[int], trips: Trips) -> Answers:
    """A round's answers: it ends with the last one, or at ``plan.deadline_s`` where one is missing.

    A device that is not done at the deadline counts as if it had not been asked.
    """
    late = trips.lost if trips.seconds is None else trips.lost | (trips.seconds > plan.deadline_s)
    there = [k for k, one in zip(asked, late.tolist(), strict=True) if not one]
    if trips.seconds is None:
        return Answers(there, trips.taken[~late], None)
    lasts = float(trips.seconds.max()) if there and not late.any() else plan.deadline_s
    return Answers(there, trips.taken[~late], lasts)


def _paces(
    plan: Plan, of: Population, asked: Sequence[int], fleet: Fleet, rows: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Virtual seconds of a step of each, and of being sent the model and sending the answer: ``[K]``."""
    can = fleet.capacity
    if can is None:
        return torch.tensor([_speed(plan, of, k) for k in asked], dtype=torch.double), torch.zeros(len(asked))
    mine = np.asarray(asked, np.int64) % len(can.pace)
    pace = can.pace[mine]
    if can.by_examples:  # so many are a step's on average
        pace = pace / 1000 * plan.local.rate * np.asarray(rows, np.float64)
    lines = np.zeros(len(mine))
    for bytes, kbps in ((fleet.down, can.down_kbps), (fleet.up, can.up_kbps)):
        if kbps is not None:
            lines += 8 * bytes / (1000 * kbps[mine])
    return torch.from_numpy(pace), torch.from_numpy(lines)


def _speed(plan: Plan, of: Population, client: int) -> float:
    """Virtual seconds of a step: lognormal over the clients."""
    assert of.step_s is not None
    z = np.random.default_rng(seeds.number(plan.seed, "speed", client)).standard_normal()
    return of.step_s * math.exp(of.step_spread * z)
