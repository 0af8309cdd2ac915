"""A crew whose workers Ray places, on this machine or on several.

Ray is spoken to by one process alone, :mod:`fedtailor.simulations.ray_driver`, which passes on messages that it does not
read; see docs/adr/0018. To whoever simulates it is all processes of a crew at once.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from io import BytesIO

from fedtailor.airgap import ray_of_our_own
from fedtailor.errors import ConfigError
from fedtailor.recipe import Part
from fedtailor.simulations.crew import Crew, Duty, begun, receive, send, tried
from fedtailor.tree import Tree

LOCAL = "local"  # the address that stands for a Ray of its own
ADDRESS = re.compile(r"local|auto|[^/\s]+:\d{1,5}")
GRACE_S = 30.0  # for Ray to end what it started


class Worker:
    """What an actor runs: a process of the crew, told by ``bytes`` and answering with ``bytes``, as :func:`send` frames them.

    Ray moves ``bytes`` as they are; it pickles this class, by its name, and its own calls.
    """

    def __init__(self) -> None:
        self.train: Callable[[Tree], Tree] = lambda told: {}

    def installed(self) -> str:
        """What results depend on beside what is said."""
        return installed()

    def begin(self, said: bytes) -> bytes:
        """The rows and a :class:`Duty`, once."""

        def work() -> Tree:
            self.train = begun(*receive(BytesIO(said)))
            return {}

        return _answer(work)

    def round(self, told: bytes) -> bytes:
        """Some of a round's clients."""
        return _answer(lambda: self.train(receive(BytesIO(told))[0]))


def _answer(work: Callable[[], Tree]) -> bytes:
    answer = BytesIO()
    send(answer, *tried(work))
    return answer.getvalue()


def installed() -> str:
    """The versions that all machines of a crew must have in common."""
    import fedtailor

    return f"fedtailor {fedtailor.__version__} with torch {version('torch').partition('+')[0]}"


@contextmanager
def ray_crew(workers: int, duty: Duty, rows: Part, address: str, gpus: float = 0.0) -> Iterator[Crew]:
    """Have Ray start ``workers`` actors; they end with the context, and with this process, however it ends.

    Args:
        address: ``local`` starts a Ray of its own that listens on loopback, and ends it; any other is a cluster's that
            runs already, ``auto`` the one that this machine is in, and stays.
        gpus: that each worker is given, a part of one or several.

    Raises:
        ConfigError: if Ray is not installed, or has no place for so many workers.
        ConnectionFailed: if there is no cluster at ``address``.
    """
    if find_spec("ray") is None:
        raise ConfigError("simulation.ray: Ray is not installed; pip install 'fedtailor[ray]', or give null: processes")
    if not ADDRESS.fullmatch(address):
        raise ConfigError(
            f"simulation.ray: {address!r} is none of local, auto and HOST:PORT, of a cluster that this machine has joined: "
            "ray start --address=HOST:PORT (ray://… pickles all that is sent, and is not taken)"
        )
    how = {"address": address, "workers": workers, "threads": duty.threads, "gpus": gpus}
    with Crew(duty.summed) as started:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fedtailor.simulations.ray_driver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | (ray_of_our_own() if address == LOCAL else {}),
            start_new_session=True,  # an interrupt is for this process, which then tells that one
        )
        started.processes = [process] * workers
        try:
            send(process.stdin, {}, how)
            send(process.stdin, {"x": rows.x, "y": rows.y}, duty._asdict())
            started.received(process)
            yield started
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let it end what it started; it is killed by the crew if that takes too long."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
