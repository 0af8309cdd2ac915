"""The daemon's side of the training process: start it confined, keep it warm, end it at its limits, start it again."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

import fedtailor
from fedtailor.client import watch
from fedtailor.client.confine import Confinement, Rules
from fedtailor.client.site import SiteConfig
from fedtailor.client.watch import LimitPassed, Limits
from fedtailor.errors import FedtailorError

log = logging.getLogger("fedtailor.client")
TRIES = 3  # how often a request is made again when the training process dies in it
START_S = 600.0  # to import what it needs, from a cold disk
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
)


class WorkerDied(FedtailorError):
    """The training process ended in the middle of something."""

    code = "worker"


class WorkerStopped(Exception):
    """The training process was ended because the daemon is stopping."""


class Workshop:
    """One training process, started again when it dies. It does one thing at a time, whichever thread asks.

    ``log`` lies in the site's state folder, beside the folders that the process may read and the one it may write.
    """

    def __init__(self, config: SiteConfig, log: Path) -> None:
        self.config, self.log = config, log
        self.scratch = log.parent / "work"
        self.confinement: Confinement | None = None  # of the process that was started last
        self.process: subprocess.Popen[bytes] | None = None
        self.seen: tuple[int, int] | None = None  # the data file that the process may read
        self.lock = threading.Lock()
        self.closed = False
        policy = config.policy
        seconds = float(policy.task_seconds)
        self.limits = Limits(seconds, seconds * config.threads, policy.task_memory_mb)

    @property
    def pid(self) -> int | None:
        """The process id, while it runs."""
        return self.process.pid if self.process and self.process.poll() is None else None

    def found(self) -> dict[str, Any] | None:
        """What confines the process, as :class:`Confinement` names it; None before it was first started."""
        return self.confinement._asdict() if self.confinement else None

    def start(self) -> None:
        """Start the process, so that the first request need not wait for it.

        Raises:
            FedtailorError: code ``confinement``, if the site requires what this host does not offer.
        """
        with self.lock:
            self._start()

    def _start(self) -> None:
        there = _identity(self.config.data.path)
        if self.pid is not None and there in (None, self.seen):
            return
        self._end()  # also where another file lies in the place of the data: the kernel lets it read the old one only
        self.seen = there
        shutil.rmtree(self.scratch, ignore_errors=True)  # of a process that died
        (self.scratch / "tmp").mkdir(mode=0o700, parents=True, exist_ok=True)
        self.scratch.chmod(0o700)
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self._command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment(),
            )
        if self.closed:  # stop() came too early to find this process
            self._end()
            raise WorkerStopped
        try:
            self._confined(self._ask("start", self._limits_to_start(), **self._first_words()))
        except FedtailorError:
            self._end()
            raise

    def _command(self) -> list[str]:
        """-P: nothing is imported from the folder that the daemon happens to have been started in."""
        return [sys.executable, "-P", "-m", "fedtailor.client.worker"]

    def _environment(self) -> dict[str, str]:
        """No proxy password, no token; and the very code that the daemon runs."""
        environment = {name: os.environ[name] for name in SAFE if name in os.environ}
        root = Path(fedtailor.__file__).parents[1]
        if root == Path.cwd():  # of a checkout, perhaps found only because the daemon was started there
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), environment.get("PYTHONPATH")]))
        threads = str(self.config.threads)
        quiet = {"PYTHONDONTWRITEBYTECODE": "1", "JOBLIB_MULTIPROCESSING": "0"}  # it could not, and need not try
        return {"OMP_NUM_THREADS": threads} | environment | quiet | {"TMPDIR": str(self.scratch / "tmp")}

    def _limits_to_start(self) -> Limits:
        return self.limits._replace(seconds=START_S, processor_seconds=START_S)

    def _first_words(self) -> dict[str, Any]:
        config, state = self.config, self.log.parent
        rules = Rules(
            data=str(config.data.path),
            read=tuple(str(state / name) for name in ("inbox", "memory")),
            scratch=str(self.scratch),
            private=(str(state.parent), str(state), str(config.keys)),
            memory_mb=config.policy.task_memory_mb,
        )
        words = {"site": config.site, "minimum": config.policy.minimum_count, "threads": config.threads}
        return {"rules": rules._asdict(), "plugins": config.policy.plugins, **words}

    def _confined(self, answer: dict[str, Any]) -> None:
        """Note what is in force; say it when it is new.

        Raises:
            FedtailorError: code ``confinement``.
        """
        limits = {"memory_mb": self.limits.memory_mb, "task_seconds": self.config.policy.task_seconds}
        found = Confinement(**answer | limits | {"missing": tuple(answer.get("missing", ()))})
        if found != self.confinement:
            for name, text in found.rows():
                log.log(logging.WARNING if found.missing else logging.INFO, "training process: %s: %s", name, text)
        self.confinement = found
        if self.config.confinement == "required" and (found.network == "none" or not found.files):
            raise FedtailorError(
                f"site.yaml says confinement: required, but on this host {'; '.join(found.missing)}; train on a host "
                "with Landlock and seccomp, or write confinement: best",
                code="confinement",
            )

    def ask(self, *, op: str, **request: Any) -> dict[str, Any]:
        """Make a request and wait for its answer; where the process dies in it, again, with a new process.

        Raises:
            WorkerDied: if the process ended each time.
            WorkerStopped: after :meth:`stop`.
            LimitPassed: if it was ended at a limit of the policy. It is not asked again.
            FedtailorError: what the process answered.
        """
        with self.lock:
            for attempt in range(1, TRIES + 1):
                if self.closed:
                    raise WorkerStopped
                try:
                    self._start()
                    return self._ask(op, self.limits, **request)
                except WorkerDied as error:
                    if self.closed:
                        raise WorkerStopped from error
                    log.warning("%s; try %d of %d", error, attempt, TRIES)
                    if attempt == TRIES:
                        raise
        raise AssertionError("unreachable")

    def _ask(self, op: str, limits: Limits, **request: Any) -> dict[str, Any]:
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"op": op, **request}).encode() + b"\n")
            self.process.stdin.flush()
            answer = watch.answer(self.process, limits)
        except OSError:
            answer = None
        except LimitPassed as error:
            self._end()
            raise LimitPassed(f"the training process was ended during {op}: {error}", code=error.code) from error
        if answer is None:  # nothing, or the half of an answer that it died in, or something that is none
            self.process.kill()
            code = self.process.wait()
            raise WorkerDied(f"the training process ended with code {code} during {op}; its log is {self.log}")
        if "error" in answer:
            raise _error(answer)
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


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_dev, info.st_ino


def _error(answer: dict[str, Any]) -> FedtailorError:
    """What the process answered. Its text is for this host's log, one line of it; its code may leave the site."""
    code, text = str(answer["error"]), str(answer.get("text"))[:2000]
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    return FedtailorError(shown, code=code if re.fullmatch("[a-z-]{1,20}", code) else WorkerDied.code)


def _close(pipe: IO[bytes] | None) -> None:
    try:
        if pipe is not None:
            pipe.close()
    except OSError:
        pass
