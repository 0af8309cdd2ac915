"""Several processes that train the clients of a simulated round: each its share in blocks of its own, one partial sum back.

They are told a plan and the rows once, and then, round by round, what was cast and whose turn it is: safetensors over
pipes, no pickle. A client's result does not depend on who trains it, so that results are those of one process, up to the
order in which numbers are added.
"""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import IO, Any, NamedTuple, Self

import torch
from safetensors.torch import load, save
from torch import Tensor

from fedtailor import recipe as recipes
from fedtailor import tree
from fedtailor.config import Precision, Steps, build
from fedtailor.errors import ConfigError, ConnectionFailed, FedtailorError, RefusedError
from fedtailor.optimizers import optimizer_of
from fedtailor.privacy.planning import Sampling, strategy_of
from fedtailor.recipe import Part, Recipe
from fedtailor.simulations.cohort import feed_from
from fedtailor.simulations.compiled import replay_of
from fedtailor.simulations.engine import Many, in_blocks
from fedtailor.simulations.hardware import HOST, across, device_of, keep_pages, placed, recipe_on
from fedtailor.simulations.paths import Task, forced
from fedtailor.simulations.precision import multiplied
from fedtailor.strategy import Strategy
from fedtailor.study import Plan
from fedtailor.tree import Tree

ALL = 1 << 40  # clients in a block: a crew divides them itself
LENGTH = struct.Struct("<Q")
MEND = "where memory was short, take fewer simulation.workers or a smaller simulation.block"


class Duty(NamedTuple):
    """What a process of the crew is told once, beside the rows."""

    plan: str
    sampling: Sampling | None
    path: str  # block, loop or vmap
    block: int
    together: bool  # whether a block may be summed while it is trained
    summed: bool  # whether nobody asks for one client's summand
    threads: int
    device: str
    streamed: bool  # whether rows lie on the host
    precision: Precision
    steps: Steps


class Died(FedtailorError):
    """A process of the crew ended by itself."""

    code = "worker"


class Crew:
    """Running processes; :meth:`many` is a :data:`fedtailor.simulations.engine.Many` for all clients of a round."""

    def __init__(self, summed: bool) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.summed = summed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def many(self, cast: Tree, memory: Tree, batches: Tree, live: Tensor, counts: Tensor) -> tuple[Tree, Tree]:
        """Train each client at one of the processes.

        Raises:
            Died: if one of them ended, for want of memory, say.
        """
        shares = torch.tensor_split(torch.arange(len(live)), min(len(self.processes), len(live)))
        for process, share in zip(self.processes, shares, strict=False):
            mine = {"memory": memory, "batches": batches}
            told = {"cast": cast, "live": live[share], "counts": counts[share], **tree.at(mine, share)}
            send(process.stdin, told, {})
        back = [self.received(process) for process, _ in zip(self.processes, shares, strict=False)]
        summands, kept = [one["summands"] for one in back], [one.get("memory", {}) for one in back]
        rows = tree.map(_cat, *summands)
        return tree.map(lambda x: x.sum(0, keepdim=True), rows) if self.summed else rows, tree.map(_cat, *kept)

    def received(self, process: subprocess.Popen[bytes]) -> Tree:
        """What a process answers; raises what went wrong there."""
        try:
            found, said = receive(process.stdout)
        except EOFError:
            code = process.wait()
            how = code if code >= 0 else f"signal {-code}"
            raise Died(f"a process of the simulation ended with {how}; {MEND}") from None
        return checked(found, said)


@contextmanager
def crew(workers: int, duty: Duty, rows: Part) -> Iterator[Crew]:
    """Start ``workers`` processes; they end with the context, and with this process, however it ends."""
    command = [sys.executable, "-P", "-m", "fedtailor.simulations.crew"]
    environment = os.environ | {"OMP_NUM_THREADS": str(duty.threads)}
    with Crew(duty.summed) as started:
        for _ in range(workers):
            started.processes.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            )
        for process in started.processes:
            send(process.stdin, {"x": rows.x, "y": rows.y}, duty._asdict())
        yield started


def served(duty: Duty, rows: Part) -> Callable[[Tree], Tree]:
    """What a process does with a round: a function of what it is told to summands and memories."""
    plan = Plan.parse(duty.plan)
    strategy, recipe, on = strategy_of(plan, sampling=duty.sampling), build(plan.recipe, Recipe), device_of(duty.device)
    start = recipes.initial(recipe, plan.seed)
    like = placed(on, strategy.start(strategy.broadcast(strategy.init(start)), strategy.remember(start)))
    recipe, there = recipe_on(recipe, on), None if duty.streamed else Part(rows.x.to(on), rows.y.to(on))
    clip = None if plan.record is None else plan.record.clip
    task = Task(recipe, strategy, plan.local.lr, clip, feed_from(plan, there, like), duty.block, duty.together)
    task = task._replace(half=duty.precision == "bf16", optimizer=optimizer_of(plan.local))
    replay = replay_of(duty.steps, on, task.feed, lambda why: print(why, file=sys.stderr))
    way = forced(duty.path, task._replace(replay=replay))
    many = across(way.many, on, HOST, rows if duty.streamed else None)
    return partial(_round, strategy, many, duty, [way.block])


def _round(strategy: Strategy, many: Many, duty: Duty, fits: list[int], told: Tree) -> Tree:
    """A round; the last of ``fits`` is how many clients there is memory for at once, as far as is known."""

    def smaller(block: int) -> None:
        fits.append(block)
        print(f"simulation.block: out of memory; {block} at once from now on", file=sys.stderr)

    acc, kept = list[Tree](), list[Tree]()
    given = told["cast"], told.get("memory", {}), told["batches"], told["live"], told["counts"]
    for _, summands, mem in in_blocks(many, *given, fits[-1], smaller):
        acc = [strategy.reduce.add(acc[0] if acc else None, summands)] if duty.summed else [*acc, summands]
        kept.append(mem)
    found = tree.at(acc[0], None) if duty.summed else tree.map(_cat, *acc)
    return {"summands": found, "memory": tree.map(_cat, *kept)}


def _cat(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def send(pipe: IO[bytes] | None, what: Tree, said: dict[str, Any]) -> None:
    """Write tensors and what is said beside them."""
    assert pipe is not None
    tensors = {name: x.contiguous() for name, x in tree.flatten(what).items()}
    head, raw = json.dumps(said).encode(), save(tensors)
    try:
        for piece in (LENGTH.pack(len(head)), head, LENGTH.pack(len(raw)), raw):
            pipe.write(piece)
        pipe.flush()
    except BrokenPipeError:  # it died; whoever waits for its answer says so
        pass


def receive(pipe: IO[bytes] | None) -> tuple[Tree, dict[str, Any]]:
    """Read what :func:`send` wrote; raises EOFError at the pipe's end."""
    assert pipe is not None
    head, raw = (read(pipe, LENGTH.unpack(read(pipe, LENGTH.size))[0]) for _ in range(2))
    said: dict[str, Any] = json.loads(head)
    return tree.unflatten(load(raw)), said


def read(pipe: IO[bytes], count: int) -> bytes:
    """So many bytes; raises EOFError if there are fewer."""
    found = pipe.read(count)
    if len(found) < count:
        raise EOFError
    return found


def pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Where a process of the crew is asked and answers. What a library prints goes to stderr, what it starts reads nothing."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    asked = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    return asked, answers


def begun(rows: Tree, said: dict[str, Any]) -> Callable[[Tree], Tree]:
    """:func:`served`, from the first message to a process."""
    sampling = None if said["sampling"] is None else Sampling(*said["sampling"])
    duty = Duty(**said | {"sampling": sampling})
    torch.set_num_threads(duty.threads)
    keep_pages()
    train, clipped = served(duty, Part(rows["x"], rows["y"])), Plan.parse(duty.plan).record is not None

    def work(told: Tree) -> Tree:
        with multiplied(duty.precision, clipped):
            return train(told)

    return work


def tried(work: Callable[[], Tree]) -> tuple[Tree, dict[str, Any]]:
    """What to answer: what ``work`` makes, or why not; it ends the simulation where it is received, with its words."""
    try:
        return work(), {}
    except Exception as error:
        kind = type(error).__name__
        words = str(error) if isinstance(error, FedtailorError) else f"{kind}: {error}"
        return {}, {"error": words, "kind": kind}


def checked(found: Tree, said: dict[str, Any]) -> Tree:
    """What :func:`tried` answered; raises what went wrong there."""
    if "error" in said:
        kinds = {kind.__name__: kind for kind in (ConfigError, ConnectionFailed, Died, RefusedError)}
        raise kinds.get(said["kind"], FedtailorError)(said["error"])
    return found


def main() -> None:
    """Serve rounds until the pipe is closed."""
    asked, answers = pipes()
    try:
        train = begun(*receive(asked))
        while True:
            told, _ = receive(asked)
            send(answers, *tried(partial(train, told)))
    except (EOFError, KeyboardInterrupt):
        return


if __name__ == "__main__":
    main()
