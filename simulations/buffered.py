"""Rounds that do not wait for everybody, on a virtual clock: the rule of ``server/rounds.py``, in a simulation.

Every site that has answered is asked at the begin of a round; those that are asked at a time train as one block. A round
closes when the buffer is full, a quorum of it with answers to this round's own model, or at its deadline.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedtailor import tree
from fedtailor.errors import ConfigError
from fedtailor.simulations.engine import Many
from fedtailor.strategy import Strategy
from fedtailor.study import Buffer, Plan
from fedtailor.tree import Tree

Keep = Callable[[Tree, int, int], Tensor | None]


class Answer(NamedTuple):
    """A summand on its way."""

    due: float  # virtual seconds
    client: int
    round: int  # that it answers
    summand: Tree  # leaves [1, ...]
    lost: bool = False  # it never comes; at ``due`` nobody waits for it any more


class Clock(NamedTuple):
    """What is carried from round to round beside the state and the memories."""

    now: float  # virtual seconds
    coming: tuple[Answer, ...] = ()


def steps_within(plan: Plan, step_s: Tensor) -> Tensor:
    """How many local steps each client takes ``[K]``: as many as it begins in ``local.within_s``, one at least.

    Args:
        step_s: seconds of one step of each client, ``[K]``.
    """
    steps = torch.full_like(step_s, plan.local.steps)
    if plan.local.within_s is None:
        return steps
    return torch.minimum(steps, torch.floor(plan.local.within_s / step_s) + 1)


def buffered_round(
    plan: Plan,
    strategy: Strategy,
    many: Many,
    state: Tree,
    memory: Tree,
    batches: Tree,
    live: Tensor,
    num_examples: Tensor,
    round: int,
    clock: Clock,
    seconds: Tensor,
    keep: Keep = lambda summand, client, round: None,
) -> tuple[Tree, Tree, Clock, list[dict[str, Any]]]:
    """One round; returns the next state, memories and clock, and the answers that were too old to count.

    Args:
        seconds: that each client's round takes.
        keep: an empty tensor where a client's answer does not leave its site.

    Shapes:
        memory: leaves ``[K, ...]``; batches: leaves ``[K, S, ...]``; live: ``[K, S]``; num_examples, seconds: ``[K]``.

    Raises:
        ConfigError: code ``quorum``, if fewer answers to this round than the quorum come by its deadline.
    """
    buffer = plan.buffer or Buffer(answers=len(plan.sites))
    busy = {one.client for one in clock.coming}
    asked = torch.tensor([k for k in range(len(seconds)) if k not in busy], dtype=torch.long)
    coming = list(clock.coming)
    if len(asked):
        part = tree.at(memory, asked), tree.at(batches, asked), live[asked], num_examples[asked]
        summands, kept = many(strategy.broadcast(state), *part)
        memory = tree.map(lambda old, new: old.index_copy(0, asked, new), memory, kept)
        for row, k in enumerate(asked.tolist()):
            coming.append(Answer(clock.now + float(seconds[k]), k, round, tree.at(summands, slice(row, row + 1))))
    coming.sort(key=lambda one: (one.due, one.client))
    end, now, fresh, count, acc, stale = clock.now + plan.deadline_s, clock.now, 0, 0, None, []
    while coming and coming[0].due <= end and not (count >= buffer.answers and fresh >= plan.quorum):
        one = coming.pop(0)
        now, late = one.due, round - one.round
        if late > buffer.oldest:
            stale.append({"round": round, "site": plan.sites[one.client], "code": "stale"})
        elif keep(one.summand, one.client, round) is None:
            weight = buffer.weight(late)
            acc = strategy.reduce.add(acc, tree.map(lambda x, w=weight: x * w, one.summand) if late else one.summand)
            fresh, count = fresh + (not late), count + 1
    if acc is None or fresh < plan.quorum:
        came = f"{fresh} of {len(plan.sites)} sites replied, the quorum is {plan.quorum}"
        raise ConfigError(
            f"round {round}: {came}, within deadline_s={plan.deadline_s:g} virtual seconds", code="quorum"
        )
    after = strategy.apply(state, strategy.reduce.done(acc), round)
    return after, memory, Clock(now, tuple(coming)), stale
