"""Where the runs of a sweep are done: here, or several at once by joblib, Ray or submitit. See docs/adr/0021-sweeps.md.

What a library is given to run is one function of strings, found by its name: no object of ours is pickled. A library is
imported when its launcher is chosen.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, NamedTuple

from fedtailor.airgap import ray_of_our_own
from fedtailor.errors import ConfigError

Work = Callable[[list[str], str, bool], str | None]  # Task -> None, or why it failed
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
POLL_S = 0.5
FOR_EVER = 60 * 24 * 365  # minutes


class Task(NamedTuple):
    """One run; no two tasks of a sweep have the same folder."""

    overrides: list[str]
    folder: str
    resume: bool


class Room(NamedTuple):
    """What runs are done in."""

    jobs: int | None  # at once; None: as many as there are cores, or as Slurm lets in
    root: Path  # the sweep's folder
    asked: Mapping[str, Any] = {}  # of submitit, by its names


def local(work: Work, tasks: Sequence[Task], room: Room) -> Iterator[tuple[str, str | None]]:
    """One after the other, in this process: each task's folder, and why it failed, as it ends."""
    for task in tasks:
        yield task.folder, work(*task)


def by_joblib(work: Work, tasks: Sequence[Task], room: Room) -> Iterator[tuple[str, str | None]]:
    """In processes of this machine, each of which does one run after the other; in the order in which they end.

    Where a process is killed, for want of memory, say, joblib gives up all that were under way. These are run again, each
    by itself, and who is killed then has failed.
    """
    from joblib import Parallel, delayed
    from joblib.externals.loky import get_reusable_executor
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    jobs, left = at_once(tasks, room), {task.folder: task for task in tasks}
    how: dict[str, Any] = {"backend": "loky", "return_as": "generator_unordered", "batch_size": 1, "max_nbytes": None}
    try:
        with threads_each(jobs):
            while left:
                try:
                    calls = (delayed(_away)(os.getpid(), work, *task) for task in list(left.values()))
                    for folder, error in Parallel(n_jobs=jobs, pre_dispatch="n_jobs", **how)(calls):
                        del left[folder]
                        yield folder, error
                except TerminatedWorkerError:
                    for task in list(left.values())[:jobs]:  # they were begun in this order
                        with suppress(TerminatedWorkerError):
                            yield from Parallel(n_jobs=2, **how)([delayed(_away)(os.getpid(), work, *task)])
                            del left[task.folder]
                        if left.pop(task.folder, None):
                            yield task.folder, KILLED
    finally:
        get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=True)


KILLED = (
    "its process was killed while no other run was beside it; where memory was short, take a smaller simulation.block"
)


def _away(parent: int, work: Work, overrides: list[str], folder: str, resume: bool) -> tuple[str, str | None]:
    _end_with(parent)
    return folder, work(overrides, folder, resume)


@cache
def _end_with(parent: int) -> None:
    """See to it that this process ends when ``parent`` was killed: joblib's go on without it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    if os.getpid() != parent:  # as it is where there is one job
        Thread(target=watch, daemon=True).start()


def by_ray(work: Work, tasks: Sequence[Task], room: Room) -> Iterator[tuple[str, str | None]]:
    """As tasks of a Ray of our own on this machine, reached by loopback and with a token only, which ends with the sweep.

    A task whose process is killed is begun once more.
    """
    jobs = at_once(tasks, room)
    with (
        TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        threads_each(jobs),
        settings(ray_of_our_own()),  # which Ray reads when it is imported
    ):
        try:
            import ray
        except ImportError as error:
            raise ConfigError(
                "--launcher ray: it comes with an extra: pip install 'fedtailor[ray]'", code="extra"
            ) from error
        try:
            try:
                ray.init(
                    address="local",
                    num_cpus=jobs,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="FATAL",
                    _node_ip_address="127.0.0.1",
                    _temp_dir=str(Path(folder) / "r"),  # Ray opens it to everybody, in a folder that is not
                )
            except Exception as error:  # of many kinds: no room in its folder's name, memory or processes
                words = "on a busy machine try again, or take --launcher joblib"
                raise ConfigError(f"--launcher ray: Ray does not start; {words}: {_brief(error)}") from error
            cards = int(ray.cluster_resources().get("GPU", 0))
            share = cards // jobs or (cards and 1 / math.ceil(jobs / cards))
            remote = ray.remote(num_cpus=1, num_gpus=share, max_retries=1)(work)
            under_way = {remote.remote(*task): task.folder for task in tasks}
            while under_way:
                (done,), _ = ray.wait(list(under_way), num_returns=1)
                yield under_way.pop(done), _answer(partial(ray.get, done))
        finally:
            ray.shutdown()


def by_submitit(work: Work, tasks: Sequence[Task], room: Room) -> Iterator[tuple[str, str | None]]:
    """As jobs of a Slurm cluster where there is one, else as processes of this machine.

    Files that submitit writes, pickles among them, lie in ``submitit`` of the sweep's folder, which is this user's alone.
    """
    try:
        import submitit
    except ImportError as error:
        raise ConfigError(
            "--launcher submitit: it comes with an extra: pip install 'fedtailor[slurm]'", code="extra"
        ) from error

    asked, jobs = {"timeout_min": FOR_EVER, **room.asked}, at_once(tasks, room)
    folder = room.root / "submitit"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=asked.pop("cluster", None))
        slurm = executor.cluster == "slurm"
        if slurm and "timeout_min" not in room.asked:  # submitit's own is five minutes
            raise ValueError("say how long one run may take; --submitit timeout_min=120")
        if slurm and room.jobs:
            asked["slurm_array_parallelism"] = room.jobs
        executor.update_parameters(**asked)
    except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"--submitit: {str(error).splitlines()[0]}") from error
    waiting, under_way = list(tasks), dict[Any, str]()
    try:
        with threads_each(None if slurm else jobs):
            while waiting or under_way:
                more = len(waiting) if slurm else jobs - len(under_way)
                begun, waiting = waiting[:more], waiting[more:]
                if begun:
                    with executor.batch():  # of Slurm, one array
                        started = [executor.submit(work, *task) for task in begun]
                    under_way |= {job: task.folder for job, task in zip(started, begun, strict=True)}
                ended = [job for job in under_way if job.done()]
                for job in ended:
                    yield under_way.pop(job), _answer(job.result)
                time.sleep(0 if ended else POLL_S)
    finally:
        for job in under_way:
            job.cancel(check=False)


LAUNCHERS: dict[str, Callable[[Work, Sequence[Task], Room], Iterator[tuple[str, str | None]]]] = {
    "local": local,
    "joblib": by_joblib,
    "ray": by_ray,
    "submitit": by_submitit,
}


def parsed(asked: Sequence[str]) -> dict[str, Any]:
    """Settings of submitit as they are written on the command line: JSON, or else a word.

    >>> parsed(["timeout_min=60", "slurm_partition=gpu", 'slurm_additional_parameters={"account": "a1"}'])
    {'timeout_min': 60, 'slurm_partition': 'gpu', 'slurm_additional_parameters': {'account': 'a1'}}

    Raises:
        ConfigError: naming what is no KEY=VALUE.
    """
    found = dict[str, Any]()
    for one in asked:
        key, equals, value = one.partition("=")
        if not (key and equals):
            raise ConfigError(f"--submitit {one}: write KEY=VALUE, timeout_min=120, say")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def _answer(ask: Callable[[], str | None]) -> str | None:
    """What a run said, or in a line why there is no answer: its process was killed, say."""
    try:
        return ask()
    except Exception as error:  # of whichever kind the library has for it
        return _brief(error)


def _brief(error: Exception) -> str:
    lines = str(error).splitlines()
    return " ".join([f"{type(error).__name__}:", *lines[:2], *lines[2:][-1:]])


def at_once(tasks: Sequence[Task], room: Room) -> int:
    """How many of the tasks are run at the same time."""
    return min(room.jobs or cores(), len(tasks))


def cores() -> int:
    """Those that this process may use."""
    from joblib import cpu_count

    count: int = cpu_count()
    return count


@contextmanager
def threads_each(jobs: int | None) -> Iterator[None]:
    """Processes started meanwhile share the cores, if there are ``jobs`` of them, unless the environment says otherwise."""
    each = str(max(1, cores() // jobs)) if jobs else ""
    with settings({name: each for name in THREADS if each and not os.environ.get(name)}):
        yield


@contextmanager
def settings(wanted: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for what is started meanwhile."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
