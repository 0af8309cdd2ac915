"""Virtual devices: how long a client of a population takes, whether it answers, and how long its round lasts."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedtailor import seeds
from fedtailor.population import Population
from fedtailor.simulations.buffered import steps_within
from fedtailor.study import Plan


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


def trips(plan: Plan, of: Population, round: int, asked: Sequence[int]) -> Trips:
    """A device keeps its speed, and is lost in a round by a draw of its own.

    One that is too slow for ``local.within_s`` takes fewer steps.
    """
    lost = torch.tensor(
        [seeds.number(plan.seed, "dropout", round, k) < of.dropout * 2**63 for k in asked], dtype=torch.bool
    )
    if of.step_s is None:
        return Trips(torch.full((len(asked),), float(plan.local.steps)), None, lost)
    speeds = torch.tensor([_speed(plan, of, k) for k in asked], dtype=torch.double)
    taken = steps_within(plan, speeds)
    return Trips(taken, taken * speeds, lost)


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


def _speed(plan: Plan, of: Population, client: int) -> float:
    """Virtual seconds of a step: lognormal over the clients."""
    assert of.step_s is not None
    z = np.random.default_rng(seeds.number(plan.seed, "speed", client)).standard_normal()
    return of.step_s * math.exp(of.step_spread * z)
