"""Virtual devices: how long a client of a population takes, whether it answers, and how long its round lasts."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedtailor import seeds
from fedtailor.population import Population
from fedtailor.simulations.buffered import steps_within
from fedtailor.study import Plan


class Answers(NamedTuple):
    """Who of those that were asked answers in time."""

    clients: list[int]
    taken: Tensor  # [K] local steps of each
    lasts: float | None  # virtual seconds of the round; None without a clock


def answers(plan: Plan, of: Population, round: int, asked: Sequence[int]) -> Answers:
    """Who answers: a device keeps its speed, and is lost in a round by a draw of its own.

    A round ends with the last answer, or at ``plan.deadline_s`` where one is missing. A device that is too slow for
    ``local.within_s`` takes fewer steps; one that is not done at the deadline counts as if it had not been asked.
    """
    there = [k for k in asked if seeds.number(plan.seed, "dropout", round, k) >= of.dropout * 2**63]
    if of.step_s is None:
        return Answers(there, torch.full((len(there),), float(plan.local.steps)), None)
    speeds = torch.tensor([_speed(plan, of, k) for k in there])
    taken = steps_within(plan, speeds)
    seconds = taken * speeds
    late = seconds > plan.deadline_s
    missing = len(there) < len(asked) or bool(late.any())
    lasts = plan.deadline_s if missing or not len(seconds) else float(seconds.max())
    return Answers([k for k, one in zip(there, late.tolist(), strict=True) if not one], taken[~late], lasts)


def _speed(plan: Plan, of: Population, client: int) -> float:
    """Virtual seconds of a step: lognormal over the clients."""
    assert of.step_s is not None
    z = np.random.default_rng(seeds.number(plan.seed, "speed", client)).standard_normal()
    return of.step_s * math.exp(of.step_spread * z)
