"""Children that end with the measurement, and how much memory a family of processes holds."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType


def family(root: int) -> list[int]:
    """``root`` and all its descendants that are alive, by process id."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue  # it has ended meanwhile
            children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for pid in found:  # grows while it is walked
        found += children.get(pid, [])
    return found


def resident(pid: int) -> int:
    """Resident bytes of a process; 0 where it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


class Family:
    """Processes started here. All of them and their descendants are ended on the way out, exceptions included."""

    def __init__(self, logs: Path, environment: Mapping[str, str]) -> None:
        self.logs, self.environment = logs, dict(environment)
        self.started: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Family":
        return self

    def start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start ``command`` in a process group of its own, with its output in ``logs/<name>.log``."""
        with (self.logs / f"{name}.log").open("wb") as log:
            self.started[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )
        return self.started[name]

    def log(self, name: str) -> str:
        """What a process has printed so far."""
        return (self.logs / f"{name}.log").read_text(errors="replace")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Every process to end is known before the first ends: an orphan no longer tells whose child it was.
        doomed = {pid for process in self.started.values() if process.poll() is None for pid in family(process.pid)}
        _signal(doomed, signal.SIGTERM)
        end = time.monotonic() + 10
        while time.monotonic() < end and any(_alive(pid) for pid in doomed):
            time.sleep(0.1)
        _signal({pid for pid in doomed if _alive(pid)}, signal.SIGKILL)
        for process in self.started.values():
            process.wait()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _signal(pids: set[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass  # it ended by itself


class PeakMemory:
    """Polls the resident memory of a process and its descendants while the context lasts."""

    def __init__(self, root: int, every_s: float = 0.2) -> None:
        self.root, self.every_s = root, every_s
        self.together = 0  # bytes, of all of them at one moment; shared pages count more than once
        self.largest = 0  # bytes, of any one of them
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def _poll(self) -> None:
        known, until = list[int](), 0.0
        while not self._stop.wait(self.every_s):
            if time.monotonic() >= until:  # walking /proc costs a thousand times what one process's memory does
                known, until = family(self.root), time.monotonic() + 1
            each = [resident(pid) for pid in known]
            self.together = max(self.together, sum(each))
            self.largest = max(self.largest, *each)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
