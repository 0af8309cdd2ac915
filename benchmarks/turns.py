"""Sides that take turns, so that no drift of the machine favours one, and ratios of each turn to what was around it.

The first side is measured before and after every turn of another. That turn's ratio is its seconds to the mean of these two.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks.peer_rounds import COLD

Run = Callable[[], None]  # a round
Now = Callable[[], float]  # seconds, of a processor or by the clock
ENOUGH = 0.3  # seconds that a turn lasts here, or more


class Rounds(NamedTuple):
    """One turn."""

    seconds: list[float]  # of each round that counts
    warm_up_s: list[float]  # of those before them, if any


class Side(NamedTuple):
    """Something that can be measured again and again."""

    turn: Callable[[], Rounds]
    threads: int = 1  # of torch, in each of its processes
    warm_up_s: tuple[float, ...] = ()  # rounds before its first turn, that do not count
    compile_s: float | None = None  # by the clock, of the round before these, in which its steps were compiled


class Figures(NamedTuple):
    """What was measured of a side."""

    seconds: list[float]  # of a round: each turn's median
    times_the_first: list[float]  # each turn's ratio; of the first side, none
    warm_up_s: list[list[float]]  # rounds that do not count, each time that they had to be made
    compile_s: float | None
    threads: int


def seconds(run: Run, now: Now = time.perf_counter) -> float:
    """Of one round."""
    began = now()
    run()
    return now() - began


def here(run: Run, now: Now = time.process_time, threads: int = 1, compiles: bool = False) -> Side:
    """A side in this process, warmed up.

    Args:
        compiles: whether its first round does, which is then told apart.
    """

    def turn() -> Rounds:
        torch.set_num_threads(threads)
        seconds(run, now)  # others had the caches; a peer's first two rounds do not count in any of its turns
        return Rounds([seconds(run, now) for _ in range(often)], [])

    torch.set_num_threads(threads)
    compile_s = seconds(run) if compiles else None
    cold = tuple(seconds(run, now) for _ in range(COLD))
    often = max(1, round(ENOUGH / max(cold[-1], 1e-4)))
    return Side(turn, threads, cold, compile_s)


def in_turns(sides: dict[str, Side], turns: int) -> dict[str, Figures]:
    """Measure each side so many times, and the first around each of the others."""
    found = {name: _nothing(side) for name, side in sides.items()}
    first, *others = sides
    before = _measured(sides[first], found[first])
    for _ in range(turns):
        for name in others:
            between = _measured(sides[name], found[name])
            after = _measured(sides[first], found[first])
            found[name].times_the_first.append(2 * between / (before + after))
            before = after
    return found


def _nothing(side: Side) -> Figures:
    return Figures([], [], [list(side.warm_up_s)] if side.warm_up_s else [], side.compile_s, side.threads)


def _measured(side: Side, figures: Figures) -> float:
    rounds = side.turn()
    figures.seconds.append(median(rounds.seconds))
    if rounds.warm_up_s:
        figures.warm_up_s.append(rounds.warm_up_s)
    return figures.seconds[-1]


def table(found: dict[str, dict[str, Figures]]) -> str:
    """In Markdown, one row a side."""
    heads = ["a round", "side", "ms", "times the first side", "warm-up, ms", "compiled in, s"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|---:|---:|---:|---:|"]
    for what, sides in found.items():
        for side, figures in sides.items():
            cells = [
                what,
                side,
                _spread([1e3 * each for each in figures.seconds], ".1f"),
                _spread(figures.times_the_first, ".2f") if figures.times_the_first else "1",
                f"{1e3 * median(map(sum, figures.warm_up_s)):.1f}" if figures.warm_up_s else "",
                "" if figures.compile_s is None else f"{figures.compile_s:.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plain(found: dict[str, dict[str, Figures]]) -> dict[str, Any]:
    """As JSON has it."""
    return {what: {side: figures._asdict() for side, figures in sides.items()} for what, sides in found.items()}


def _spread(values: list[float], form: str) -> str:
    """Median (least to greatest)."""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
