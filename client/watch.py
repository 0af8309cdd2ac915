"""What the daemon waits for, and for how long: an answer of the training process within the limits of one task."""

import json
import os
import select
import time
from pathlib import Path
from subprocess import Popen
from typing import Any, NamedTuple

from fedtailor.errors import FedtailorError

PAUSE = 0.1  # seconds between two looks at the process
LONGEST = 2**20  # bytes of one answer: it describes data and files, it does not carry them
PAGE, TICK = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")


class LimitPassed(FedtailorError):
    """The training process passed a limit of the site's policy; code ``time`` or ``memory``."""


class Limits(NamedTuple):
    """Of one task."""

    seconds: float  # by the clock
    processor_seconds: float  # of all of its threads together
    memory_mb: int  # resident, of the whole process: what a task leaves behind counts in the next


class Usage(NamedTuple):
    """What a process has used so far. Zero where the host does not say (there is no /proc)."""

    processor_seconds: float
    memory_bytes: int


def usage(pid: int) -> Usage:
    """What ``pid`` has used, all of its threads together."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        resident = Path(f"/proc/{pid}/statm").read_bytes().split()[1]
        return Usage((int(fields[11]) + int(fields[12])) / TICK, int(resident) * PAGE)
    except (OSError, IndexError):  # it has ended
        return Usage(0.0, 0)


def answer(process: Popen[bytes], limits: Limits) -> dict[str, Any] | None:
    """Wait for the next line of ``process``; None where it ends, or says something else than one JSON object.

    Raises:
        LimitPassed: if it passes a limit; whoever asked must end it.
    """
    assert process.stdout is not None
    handle, got = process.stdout.fileno(), b""
    began, before = time.monotonic(), usage(process.pid).processor_seconds
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    while not got.endswith(b"\n"):
        if poll.poll(PAUSE * 1000):
            piece = os.read(handle, 2**16)
            got += piece
            if not piece or len(got) > LONGEST:
                return None
        now = usage(process.pid)
        check(limits, time.monotonic() - began, now._replace(processor_seconds=now.processor_seconds - before))
    try:
        document = json.loads(got)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def check(limits: Limits, seconds: float, used: Usage) -> None:
    """Compare what a task has used with its limits; LimitPassed names the one that is passed."""
    if seconds > limits.seconds:
        raise LimitPassed(f"it took longer than {limits.seconds:g} s (policy.task_seconds)", code="time")
    if used.processor_seconds > limits.processor_seconds:
        allowed = f"{limits.processor_seconds:g} s of processor time (policy.task_seconds times threads)"
        raise LimitPassed(f"it took longer than {allowed}", code="time")
    if used.memory_bytes > limits.memory_mb * 2**20:
        raise LimitPassed(f"it took more memory than {limits.memory_mb} MB (policy.task_memory_mb)", code="memory")
