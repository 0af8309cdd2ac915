"""The daemon's side of the training process: start it, keep it warm, start it again when it dies."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

from fedtailor.client.site import SiteConfig
from fedtailor.errors import FedtailorError

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


class Workshop:
    """One training process. Not to be shared between threads without :attr:`lock`."""

    def __init__(self, config: SiteConfig, log: Path) -> None:
        self.config, self.log = config, log
        self.process: subprocess.Popen[str] | None = None
        self.lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The process id, while it runs."""
        return self.process.pid if self.process and self.process.poll() is None else None

    def start(self) -> None:
        """Start the process if it does not run."""
        if self.pid is not None:
            return
        self.stop()
        environment = {name: os.environ[name] for name in SAFE if name in os.environ}  # no proxy password, no token
        command = [sys.executable, "-m", "fedtailor.client.worker"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        config = self.config
        self._ask(
            op="start",
            site=config.site,
            data=str(config.data.path),
            minimum=config.policy.minimum_count,
            threads=config.threads,
        )

    def ask(self, *, op: str, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            WorkerDied: if the process ended; the next call starts a new one.
            FedtailorError: what the process answered.
        """
        with self.lock:
            self.start()
            return self._ask(op=op, **request)

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
        if not line:
            code = self.process.wait()
            raise WorkerDied(f"the training process ended with code {code} during {op}; its log is {self.log}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise FedtailorError(answer["text"], code=answer["error"])
        return answer

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            for pipe in (self.process.stdin, self.process.stdout):
                _close(pipe)
            self.process.kill()
            self.process.wait()
            self.process = None


def _close(pipe: IO[str] | None) -> None:
    try:
        if pipe is not None:
            pipe.close()
    except OSError:
        pass
