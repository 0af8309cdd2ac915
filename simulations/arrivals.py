"""Rounds of a population that wait for nobody, on a virtual clock: so many clients train at any time.

Nguyen et al. 2022, Federated Learning with Buffered Asynchronous Aggregation, https://arxiv.org/abs/2106.06639. A client
begins with the model of the round that is open then, and another is drawn for it when it is done. A round closes when
its buffer is full, or at its deadline. What happens when does not depend on what is learnt: it is worked out first, and
then all who begin with one round's model are trained as a block.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedtailor import tree
from fedtailor.simulations.buffered import Answer, Clock
from fedtailor.simulations.devices import WAKES, Trip
from fedtailor.strategy import Strategy
from fedtailor.study import Plan
from fedtailor.tree import Tree

Draw = Callable[[int, int, int, set[int], float], list[int]]
"""Clients that begin: round, which draw of it, how many, who cannot, the virtual second; fewer where there are no more."""


class Flow(NamedTuple):
    """How a round goes by the clock."""

    begun: list[int]  # who begins with its model and answers some time, ascending
    came: tuple[Answer, ...]  # what counts in it, as it comes; those to its own model have yet to be trained
    old: tuple[Answer, ...]  # what comes and is too old to count
    clock: Clock  # at its end; what is on its way to its own model has yet to be trained


def flow(
    plan: Plan,
    fills: int,
    slots: int,
    draw: Draw,
    trip: Trip,
    round: int,
    clock: Clock,
    wakes: Callable[[float], float] = lambda now: math.inf,
) -> Flow:
    """Work out a round.

    A client begins at most once in a round. One whose answer does not come, or not within ``plan.deadline_s``, is given
    up then, and another is drawn. Answers of one moment come before anybody begins in it.

    Args:
        fills: answers that close the round.
        slots: clients that train at any time, where so many can be drawn.
        wakes: the next second, later than the one given, in which there may be more to draw from.
    """
    assert plan.buffer is not None
    under, begun, came, old = list(clock.coming), dict[int, bool](), list[Answer](), list[Answer]()
    heapq.heapify(under)
    now, draws = clock.now, 0

    def fill() -> None:
        nonlocal draws
        if len(under) >= slots:
            return
        chosen = draw(round, draws, slots - len(under), {one.client for one in under} | begun.keys(), now)
        draws += 1
        _, seconds, lost = trip(round, chosen, now)
        assert seconds is not None
        for k, takes, gone in zip(chosen, seconds.tolist(), lost.tolist(), strict=True):
            begun[k] = gone or takes > plan.deadline_s
            heapq.heappush(under, Answer(now + (plan.deadline_s if begun[k] else takes), k, round, {}, begun[k]))

    fill()
    for _ in range(WAKES):  # nobody is there: the round begins when somebody is
        if under or not math.isfinite(wakes(now)):
            break
        now = wakes(now)
        fill()
    end = now + plan.deadline_s
    while len(came) < fills:
        following = under[0].due if under else wakes(now)
        if following > end:
            now = end
            break
        now = following
        while under and under[0].due == now and len(came) < fills:
            one = heapq.heappop(under)
            if not one.lost:
                (old if round - one.round > plan.buffer.oldest else came).append(one)
        if len(came) < fills:
            fill()
    alive = sorted(k for k, gone in begun.items() if not gone)
    return Flow(alive, tuple(came), tuple(old), Clock(now, tuple(sorted(under, key=lambda one: one[:2]))))


def each(clients: Sequence[int], blocks: Iterator[tuple[slice, Tree, Tree]]) -> tuple[dict[int, Tree], Tree]:
    """Every client's summand, leaves ``[1, ...]``, and all memories, ``[K, ...]``."""
    found, kept = dict[int, Tree](), list[Tree]()
    for part, summands, memories in blocks:
        kept.append(memories)
        for row, client in enumerate(clients[part]):
            found[client] = tree.at(summands, slice(row, row + 1))
    return found, tree.map(lambda *parts: torch.cat(parts), *kept)


def folded(
    plan: Plan, strategy: Strategy, state: Tree, round: int, going: Flow, fresh: dict[int, Tree]
) -> tuple[Tree, Clock, list[dict[str, Any]]]:
    """The next state; the clock with the summands that are on their way; the answers that were too old, by name.

    An answer t rounds late counts ``(1 + t) ** -plan.buffer.exponent``, its weight and all.

    Args:
        fresh: the summands of ``going.begun``.
    """
    assert plan.buffer is not None and going.came
    acc = None
    for one in going.came:
        late = round - one.round
        weight = plan.buffer.weight(late)
        summand = tree.map(lambda x, w=weight: x * w, one.summand) if late else fresh[one.client]
        acc = strategy.reduce.add(acc, summand)
    assert acc is not None
    coming = tuple(
        one._replace(summand=tree.map(_own, fresh[one.client])) if one.round == round and not one.lost else one
        for one in going.clock.coming
    )
    old = [{"round": round, "site": f"client {one.client}", "code": "stale"} for one in going.old]
    return strategy.apply(state, strategy.reduce.done(acc), round), going.clock._replace(coming=coming), old


def _own(x: Tensor) -> Tensor:
    """A copy: a row of a block keeps all of the block in memory."""
    return x.clone()
