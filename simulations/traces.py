"""Traces of real devices: how fast they compute and talk, and when they are there. Files of plain JSON, one list a column.

A population's clients have the trace's devices in turn, after these are shuffled once: client k has device k modulo
their number. Each is had equally often, and what a client has does not depend on how many clients there are. What all
functions raise: ConfigError, naming setting and file.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedtailor import seeds, store
from fedtailor.errors import ConfigError, StoreError
from fedtailor.population import Population

Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]
FILES = ("devices", "availability")  # the settings that name one
PACES, LINES = ("step_s", "ms_per_example"), ("up_kbps", "down_kbps")


class Capacity(NamedTuple):
    """What devices can do, ``[D]`` each."""

    pace: Doubles  # virtual seconds of a local step, or of a thousand examples
    by_examples: bool  # the latter
    up_kbps: Doubles | None  # thousand bits a second; None: sending takes no time
    down_kbps: Doubles | None

    def of(self, devices: Ints) -> "Capacity":
        """Some devices, in this order."""
        up, down = (None if line is None else line[devices] for line in (self.up_kbps, self.down_kbps))
        return Capacity(self.pace[devices], self.by_examples, up, down)


class Presence(NamedTuple):
    """When devices are there: in the intervals [start, end) of each period, which begins anew when it is over."""

    starts: Doubles  # [I] seconds, ascending within a device
    ends: Doubles  # [I]
    first: Ints  # [D + 1]: device d has the intervals first[d] to first[d + 1]
    period: Doubles  # [D] seconds

    def of(self, devices: Ints) -> "Presence":
        """Some devices, in this order."""
        counts = np.diff(self.first)[devices]
        first = np.concatenate([[0], counts.cumsum()])
        which = np.repeat(self.first[devices] - first[:-1], counts) + np.arange(first[-1])
        return Presence(self.starts[which], self.ends[which], first, self.period[devices])

    def at(self, now: float) -> NDArray[np.bool_]:
        """Which devices are there ``[D]``."""
        owner, phase = self._phases(now)
        found = np.zeros(len(self.period), np.bool_)
        found[owner[(self.starts <= phase) & (phase < self.ends)]] = True
        return found

    def left(self, device: int, now: float) -> float:
        """For how many more seconds a device is there without a break; below 0 where it is not."""
        low, high = self.first[device : device + 2].tolist()
        period = float(self.period[device])
        phase = now % period
        at = low + int(np.searchsorted(self.starts[low:high], phase, side="right")) - 1
        if at < low or phase >= self.ends[at]:
            return -1.0
        before = 0.0
        for _ in range(high - low + 1):  # on through intervals that follow without a gap
            if at + 1 < high and self.starts[at + 1] == self.ends[at]:
                at += 1
            elif at + 1 == high and self.ends[at] == period and self.starts[low] == 0:
                at, before = low, before + period
            else:
                return before + float(self.ends[at]) - phase
        return math.inf

    def wakes(self, now: float) -> float:
        """The next second after ``now`` in which a device comes; infinity where none ever does."""
        owner, phase = self._phases(now)
        if not len(owner):
            return math.inf
        wait = self.starts - phase
        wait = np.where(wait > 0, wait, wait + self.period[owner])
        return max(now + float(wait.min()), math.nextafter(now, math.inf))

    def _phases(self, now: float) -> tuple[Ints, Doubles]:
        """Each interval's device, and how far this one is in its period."""
        owner = np.repeat(np.arange(len(self.period)), np.diff(self.first))
        return owner, np.mod(now, self.period)[owner]


def capacity(path: str) -> Capacity:
    """Read ``{"step_s": [...]}`` or ``{"ms_per_example": [...]}``, with ``up_kbps`` and ``down_kbps`` or without."""
    columns = _columns("devices", path, {*PACES, *LINES})
    paces = [name for name in PACES if name in columns]
    if len(paces) != 1:
        raise _wrong("devices", path, f"it has to have one of {' and '.join(PACES)}, and has {paces or 'neither'}")
    found = {name: _numbers("devices", path, name, cells, least=1e-9) for name, cells in columns.items()}
    if len({len(cells) for cells in found.values()}) > 1:
        lengths = ", ".join(f"{name} {len(cells)}" for name, cells in found.items())
        raise _wrong("devices", path, f"its lists are not of one length: {lengths}")
    return Capacity(found[paces[0]], paces[0] == "ms_per_example", found.get("up_kbps"), found.get("down_kbps"))


def presence(path: str) -> Presence:
    """Read ``{"period_s": [...], "active": [[[start, end], ...], ...]}``: a device's intervals, ascending."""
    columns = _columns("availability", path, {"period_s", "active"})
    period = _numbers("availability", path, "period_s", columns.get("period_s"), least=1e-6)
    active = columns.get("active")
    if not isinstance(active, list) or len(active) != len(period):
        raise _wrong("availability", path, f"active: not a list of {len(period)} lists of intervals, one a device")
    for device, intervals in enumerate(active):
        if not apart(intervals, float(period[device])):
            raise _wrong(
                "availability",
                path,
                f"active[{device}]: not intervals [start, end], ascending from 0 to period_s[{device}]={period[device]:g}",
            )
    first = np.concatenate([[0], np.cumsum([len(one) for one in active], dtype=np.int64)])
    cells = (cell for one in active for pair in one for cell in pair)
    flat = np.fromiter(cells, np.float64).reshape(-1, 2)
    if not len(flat):
        raise _wrong("availability", path, "active: no device is ever there")
    return Presence(flat[:, 0].copy(), flat[:, 1].copy(), first, period)


def shuffled(seed: int, kind: str, devices: int, clients: int) -> Ints:
    """The numbers of ``devices`` devices at random; of the first so many, where there are fewer clients."""
    found: Ints = np.random.default_rng(seeds.number(seed, kind)).permutation(devices)
    return found[:clients]


def prints(of: Population) -> dict[str, str]:
    """The SHA-256 of each trace that a population names."""
    found = {}
    for name in FILES:
        if (path := getattr(of, name)) is not None:
            try:
                found[name] = store.digest(Path(path))
            except StoreError as error:
                raise ConfigError(f"population.{name}: {error}") from error
    return found


def _columns(name: str, path: str, known: set[str]) -> Mapping[str, Any]:
    try:
        found = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise _wrong(name, path, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _wrong(name, path, f"is not JSON: {error}") from error
    if not isinstance(found, dict) or not found.keys() <= known:
        raise _wrong(name, path, f"is not a mapping with lists under {', '.join(sorted(known))}, and nothing else")
    return found


def _numbers(name: str, path: str, column: str, cells: object, least: float) -> Doubles:
    if not isinstance(cells, list) or not cells:
        raise _wrong(name, path, f"{column}: not a list of numbers, one a device")
    for device, cell in enumerate(cells):
        if type(cell) not in (int, float) or not least <= cell <= 1e15:  # of NaN neither holds
            raise _wrong(name, path, f"{column}[{device}]: {cell!r} is not a number from {least:g} to 1e15")
    return np.array(cells, np.float64)


def apart(intervals: object, period: float) -> bool:
    """Whether it is a list of intervals that are not empty, ascending, apart, and within the period."""
    before: float = 0
    if not isinstance(intervals, list):
        return False
    for pair in intervals:
        if not isinstance(pair, list) or len(pair) != 2:
            return False
        low, high = pair
        if type(low) not in (int, float) or type(high) not in (int, float) or not before <= low < high <= period:
            return False
        before = high
    return True


def _wrong(name: str, path: str, what: str) -> ConfigError:
    return ConfigError(f"population.{name}: {path}: {what}; docs/researchers.md says what such a file holds")
