"""The process that speaks to Ray: starts it or joins a cluster, has it start workers, and passes messages on unread.

In a process of its own, because Ray takes its switches from the environment when it is imported, once for all, changes
what its process does with signals and logs, and must be shut down however the simulation ends: here, when a pipe closes.
"""

import os
import queue
import select
import shutil
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from itertools import cycle
from tempfile import TemporaryDirectory
from typing import IO, Any

from fedtailor.errors import ConfigError, ConnectionFailed
from fedtailor.simulations.crew import LENGTH, MEND, checked, pipes, read, receive, send, tried
from fedtailor.simulations.ray_crew import LOCAL, Worker, installed
from fedtailor.tree import Tree

QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "fatal"}
JOINED_S = 60.0  # for a cluster to answer
LEFT_S = 20.0  # for Ray to end what it started, once nobody waits for it
PLACED_S = 120.0  # for a cluster's machines to start the workers, also where somebody else has to end first


def main() -> None:
    """Start workers, and pass rounds on to them until the pipe is closed."""
    asked, answers = pipes()
    try:
        import ray
    except Exception as error:
        words = f"simulation.ray: Ray is damaged ({_first(error)}); pip install --force-reinstall 'fedtailor[ray]'"
        return send(answers, {}, {"error": words, "kind": "ConfigError"})
    workers: list[Any] = []
    with suppress(EOFError), TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        threading.Thread(target=_leave, args=(asked, folder), daemon=True).start()
        try:
            _, wrong = tried(lambda: start(asked, answers, folder, workers))
            send(answers, {}, wrong)
            relay(workers, asked, answers)
        finally:
            ray.shutdown()  # a cluster ends the workers when it hears of it


def start(asked: IO[bytes], answers: IO[bytes], folder: str, workers: list[Any]) -> Tree:
    """Add to ``workers`` those that are asked for, with their rows."""
    how, rows = receive(asked)[1], frame(asked)
    os.chdir(folder)  # Ray looks for modules where its driver runs
    if how["address"] == LOCAL:
        alone(how["workers"] * how["threads"], folder)
    else:
        join(how["address"], answers, folder)
    workers.extend(place(how, asked))
    begin(workers, rows)
    return {}


def alone(cpus: int, folder: str) -> None:
    """Start a Ray of its own, whose files lie in ``folder``."""
    import ray

    inside = os.path.join(folder, "r")  # short, for its sockets' names are long; Ray opens it, but not ``folder``
    try:
        ray.init(LOCAL, num_cpus=cpus, include_dashboard=False, _temp_dir=inside, **QUIET)
    except Exception as error:
        raise ConfigError(
            f"simulation.ray: local, but Ray does not start ({_first(error)}); try when the machine is less busy, or give null: processes"
        ) from error


def join(address: str, answers: IO[bytes], folder: str) -> None:
    """Connect to a cluster. Ray would wait for one for ever, and cannot be interrupted: then this process ends."""
    import ray

    def why(error: str) -> str:
        return (
            f"simulation.ray: no Ray cluster can be joined at {address} ({error}); start one with: ray start --head, "
            "and join it on this machine too: ray start --address=HOST:PORT; or give local"
        )

    def give_up() -> None:
        send(answers, {}, {"error": why(f"no answer in {JOINED_S:g} s"), "kind": ConnectionFailed.__name__})
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    timer = threading.Timer(JOINED_S, give_up)
    timer.daemon = True
    timer.start()
    try:
        if address != "auto":
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), JOINED_S).close()
        ray.init(address, **QUIET)
    except Exception as error:
        raise ConnectionFailed(why(_first(error))) from error
    finally:
        timer.cancel()


def place(how: dict[str, Any], asked: IO[bytes]) -> list[Any]:
    """Actors that run, on as many machines as there are.

    Raises:
        ConfigError: if there is no place for all of them, at once or after a while, or something else is installed where they are.
        EOFError: if nobody waits for them any more.
    """
    import ray

    count, needs = how["workers"], {"CPU": how["threads"], "GPU": how["gpus"]}
    there = ray.cluster_resources()
    fits = all(count * need <= there.get(name, 0) for name, need in needs.items())
    actor = ray.remote(Worker).options(num_cpus=needs["CPU"], num_gpus=needs["GPU"], scheduling_strategy="SPREAD")
    workers = [actor.remote() for _ in range(count)]
    waiting, end = [worker.installed.remote() for worker in workers], time.monotonic() + (PLACED_S if fits else 0.0)
    done, late = ray.wait(waiting, num_returns=count, timeout=0)
    while late and time.monotonic() < end:
        if select.select([asked], [], [], 0)[0]:
            raise EOFError
        done, late = ray.wait(waiting, num_returns=count, timeout=1)
    if late:
        raise ConfigError(
            f"simulation.workers: there is no place for {count} that ask for {needs['CPU']} CPUs (simulation.threads) and "
            f"{needs['GPU']:g} GPUs (simulation.gpus) each; Ray has {there.get('CPU', 0):g} and {there.get('GPU', 0):g}, "
            "less what others use: ask for less, or add machines with: ray start --address=…"
        )
    try:
        agree(ray.get(done))
    except ray.exceptions.RayError as error:
        raise ConfigError(
            f"simulation.ray: a worker does not start ({_first(error)}); is {installed()} on every machine?"
        ) from error
    return workers


def agree(theirs: Sequence[str]) -> None:
    """Refuse workers with other software than is here, as :func:`installed` tells it."""
    if others := sorted(set(theirs) - {installed()}):
        raise ConfigError(
            f"simulation.ray: a machine of the cluster has {others[0]}, this one {installed()}; install the same on each"
        )


def begin(workers: list[Any], rows: bytes) -> None:
    """Tell all workers the rows and their duty, which lie in Ray's object store once."""
    import ray

    stored = ray.put(rows)
    for answer in ray.get([worker.begin.remote(stored) for worker in workers]):
        checked(*receive(BytesIO(answer)))


def relay(workers: list[Any], asked: IO[bytes], answers: IO[bytes]) -> None:
    """Pass on what is asked, each message to the next worker, and what they answer, in the same order.

    Raises:
        EOFError: when nothing more is asked.
    """
    pending: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_answer, args=(pending, answers), daemon=True).start()
    turns = cycle(workers)
    while True:
        told = frame(asked)
        pending.put(next(turns).round.remote(told))


def _answer(pending: "queue.SimpleQueue[Any]", answers: IO[bytes]) -> None:
    import ray

    while True:
        try:
            answer = ray.get(pending.get())
        except ray.exceptions.RayError as error:
            send(
                answers, {}, {"error": f"a worker of simulation.ray is gone ({_first(error)}); {MEND}", "kind": "Died"}
            )
            continue
        with suppress(BrokenPipeError):
            answers.write(answer)
            answers.flush()


def _leave(asked: IO[bytes], folder: str) -> None:
    """End this process some time after whoever asks is gone, whatever it waits for then."""
    gone = select.poll()
    gone.register(asked, 0)  # what is always told: that the other end is closed
    gone.poll()
    time.sleep(LEFT_S)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def frame(pipe: IO[bytes]) -> bytes:
    """One message as it is, unread."""
    pieces = list[bytes]()
    for _ in range(2):
        size = read(pipe, LENGTH.size)
        pieces += size, read(pipe, LENGTH.unpack(size)[0])
    return b"".join(pieces)


def _first(error: Exception) -> str:
    """The line that matters of what Ray says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


if __name__ == "__main__":
    main()
