"""The daemon's side of the training process: start it, keep it warm, start it again when it dies."""

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

from fedtailor.client.site import SiteConfig
from fedtailor.errors import FedtailorError

log = logging.getLogger("fedtailor.client")
TRIES = 3  # how often a request is made again when the training process dies in it
SAFE = (
    "PATH",
    "LANG",
    "LC_ALL",
    "TZ",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "OMP_NUM_THREADS",
    "HOME",
    "TMPDIR",
)


class WorkerDied(FedtailorError):
    """The training process ended in the middle of something."""

    code = "worker"


class WorkerStopped(Exception):
    """The training process was ended because the daemon is stopping."""


class Workshop:
    """One training process, started again when it dies. It does one thing at a time, whichever thread asks."""

    def __init__(self, config: SiteConfig, log: Path) -> None:
        self.config, self.log = config, log
        self.process: subprocess.Popen[str] | None = None
        self.lock = threading.Lock()
        self.closed = False

    @property
    def pid(self) -> int | None:
        """The process id, while it runs."""
        return self.process.pid if self.process and self.process.poll() is None else None

    def start(self) -> None:
        """Start the process, so that the first request need not wait for it."""
        with self.lock:
            self._start()

    def _start(self) -> None:
        if self.pid is not None:
            return
        self._end()
        environment = {name: os.environ[name] for name in SAFE if name in os.environ}  # no proxy password, no token
        command = [sys.executable, "-m", "fedtailor.client.worker"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        if self.closed:  # stop() came too early to find this process
            self._end()
            raise WorkerStopped
        config = self.config
        self._ask(
            op="start",
            site=config.site,
            data=str(config.data.path),
            minimum=config.policy.minimum_count,
            threads=config.threads,
        )

    def ask(self, *, op: str, **request: Any) -> dict[str, Any]:
        """Make a request and wait for its answer; where the process dies in it, again, with a new process.

        Raises:
            WorkerDied: if the process ended each time.
            WorkerStopped: after :meth:`stop`.
            FedtailorError: what the process answered.
        """
        with self.lock:
            for attempt in range(1, TRIES + 1):
                if self.closed:
                    raise WorkerStopped
                try:
                    self._start()
                    return self._ask(op=op, **request)
                except WorkerDied as error:
                    if self.closed:
                        raise WorkerStopped from error
                    log.warning("%s; try %d of %d", error, attempt, TRIES)
                    if attempt == TRIES:
                        raise
        raise AssertionError("unreachable")

    def _ask(self, *, op: str, **request: Any) -> dict[str, Any]:
        assert self.process is not None
        pipe, answers = self.process.stdin, self.process.stdout
        assert pipe is not None and answers is not None
        try:
            pipe.write(json.dumps({"op": op, **request}) + "\n")
            pipe.flush()
            line = answers.readline()
        except (BrokenPipeError, OSError):
            line = ""
        if not line.endswith("\n"):  # nothing, or the half of an answer that it died in
            code = self.process.wait()
            raise WorkerDied(f"the training process ended with code {code} during {op}; its log is {self.log}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise FedtailorError(answer["text"], code=answer["error"])
        return answer

    def stop(self) -> None:
        """End the process for good; a request that is under way ends with :class:`WorkerStopped`."""
        self.closed = True
        if self.process is not None:
            self.process.kill()
        with self.lock:  # whoever was waiting for its answer has heard
            self._end()

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                _close(pipe)
            self.process = None


def _close(pipe: IO[str] | None) -> None:
    try:
        if pipe is not None:
            pipe.close()
    except OSError:
        pass
