"""FedScale's traces as ours: ``python -m fedtailor.simulations.fedscale IN.pkl OUT.json``.

They come as pickles (Lai et al. 2022, https://arxiv.org/abs/2105.11367), and a pickle can run what it likes. This reads the
opcodes of plain containers, words and numbers, and nothing is ever called or imported on a file's behalf.
"""

import argparse
import json
import math
import pickletools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtailor import store
from fedtailor.errors import ConfigError, FedtailorError
from fedtailor.simulations.traces import apart

FACTOR = 3.0  # a training example's time, in those of one that is only looked at: FedScale's own factor
VALUES = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
IDLE = ("PROTO", "FRAME")
MARK = object()  # no value that a file could name


def plain(raw: bytes) -> Any:
    """What a pickle holds, if that is dicts, lists, tuples, words, numbers, truth values and None.

    Raises:
        ConfigError: naming the first opcode that could do anything else, or what is wrong with the file.
    """
    stack, memo = list[Any](), dict[int, Any]()
    try:
        for op, arg, _ in pickletools.genops(raw):
            if op.name == "STOP":
                return _taken(stack, 1)[0]
            _step(op.name, arg, stack, memo)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise ConfigError(f"it is no pickle of plain values: {type(error).__name__}: {error}") from error
    raise ConfigError("it is no pickle of plain values: it does not stop")


def _step(name: str, arg: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    if name in VALUES:
        stack.append(arg)
    elif name in CONSTANTS:
        stack.append(CONSTANTS[name])
    elif name in EMPTY:
        stack.append(EMPTY[name]())
    elif name == "MARK":
        stack.append(MARK)
    elif name in TUPLES:
        stack.append(tuple(_taken(stack, TUPLES[name])))
    elif name in FILLED:
        stack.append(FILLED[name](_above(stack)))
    elif name in ("APPEND", "APPENDS"):
        more = _above(stack) if name == "APPENDS" else _taken(stack, 1)
        _kind(stack[-1], list).extend(more)
    elif name in ("SETITEM", "SETITEMS"):
        more = _above(stack) if name == "SETITEMS" else _taken(stack, 2)
        _kind(stack[-1], dict).update(_pairs(more))
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
        memo[arg] = stack[-1]
    elif name in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo[arg])
    elif name not in IDLE:
        raise ConfigError(f"it has the opcode {name}, which plain values do not need, and which is not carried out")


def _above(stack: list[Any]) -> list[Any]:
    """Take what lies above the last mark, and the mark."""
    at = max(place for place, one in enumerate(stack) if one is MARK)
    found = stack[at + 1 :]
    del stack[at:]
    return found


def _taken(stack: list[Any], count: int) -> list[Any]:
    """Take so many values."""
    found = stack[len(stack) - count :] if len(stack) >= count else [MARK]
    if any(one is MARK for one in found):
        raise ValueError("it takes values that are not there")
    del stack[len(stack) - count :]
    return found


def _kind(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} where a {kind.__name__} has to be")
    return value


def _pairs(values: list[Any]) -> dict[Any, Any]:
    if len(values) % 2 or any(type(key) not in (int, str) for key in values[::2]):
        raise ValueError("a dict whose keys are not all whole numbers or words")
    return dict(zip(values[::2], values[1::2], strict=True))


FILLED: dict[str, Callable[[list[Any]], Any]] = {"TUPLE": tuple, "LIST": list, "DICT": _pairs}


def converted(found: Any) -> dict[str, Any]:
    """A trace as a population reads it: FedScale's ``client_device_capacity``, or its ``client_behave_trace``.

    The first says milliseconds of an example that is looked at, ``computation``, and kbit/s, ``communication``, both ways;
    the second says when a device comes, ``active``, and goes, ``inactive``, in seconds of a period, ``finish_time``.

    Raises:
        ConfigError: naming the device whose entry is of neither kind.
    """
    if not isinstance(found, dict) or not found:
        raise ConfigError("it holds no devices by their number")
    first = next(iter(found.values()))
    one = _presence if isinstance(first, dict) and "finish_time" in first else _capacity
    columns: dict[str, list[Any]] = {}
    for device, entry in found.items():
        try:
            for name, value in one(entry).items():
                columns.setdefault(name, []).append(value)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"device {device!r}: {type(error).__name__}: {error}") from error
    return columns


def _capacity(entry: Any) -> dict[str, float]:
    line = _number(entry["communication"])
    return {"ms_per_example": FACTOR * _number(entry["computation"]), "up_kbps": line, "down_kbps": line}


def _presence(entry: Any) -> dict[str, Any]:
    period = _number(entry["finish_time"])
    comes, goes = ([_number(x, 0) for x in _kind(entry[name], list)] for name in ("active", "inactive"))
    if len(comes) == len(goes) + 1:  # who has come last stays to the end
        goes.append(period)
    pairs = [[low, min(high, period)] for low, high in zip(comes, goes, strict=True) if low < min(high, period)]
    if not apart(pairs, period):
        raise ValueError("active, inactive: not the begins and ends of intervals that follow each other")
    return {"period_s": period, "active": pairs}


def _number(value: Any, least: float = 1e-9) -> float:
    if type(value) not in (int, float) or not (math.isfinite(value) and value >= least):
        raise ValueError(f"{value!r} is not a number from {least:g}")
    return float(value)


def main(words: list[str] | None = None) -> int:
    """Convert one file; returns the exit code."""
    parser = argparse.ArgumentParser("python -m fedtailor.simulations.fedscale", description=__doc__)
    parser.add_argument("pickle", type=Path, help="client_device_capacity or client_behave_trace, as FedScale has them")
    parser.add_argument("out", type=Path, help="a JSON file for population.devices or population.availability")
    told = parser.parse_args(words)
    try:
        columns = converted(plain(told.pickle.read_bytes()))
        store.write_text(told.out, json.dumps(columns, separators=(",", ":"), allow_nan=False))
    except (FedtailorError, OSError) as error:
        print(f"{told.pickle}: {error}", file=sys.stderr)
        return 1
    print(f"{told.out}: {len(next(iter(columns.values())))} devices; {', '.join(columns)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
