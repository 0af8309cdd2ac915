"""A block's work as one CUDA graph: recorded once for inputs of some shapes, and replayed for others of the same.

What is recorded is all of a block's steps, unrolled: the first, in which clients share weights, and those after it differ.
So a replay depends on what was copied into its buffers, and on the rows, which stay where they are. Noise that the host
draws is in no buffer, and a block that is fed seeds of it is not recorded.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedtailor import tree
from fedtailor.simulations.engine import out_of_memory
from fedtailor.simulations.hardware import HOSTS_OWN
from fedtailor.tree import Tree

Step = Callable[[Tree, Tree, Tree, Tensor, Tensor], Tree]  # what a Many is given -> all that comes of it, as one tree
Capture = Callable[[Callable[[], Tree]], tuple[Callable[[], None], Tree]]
"""Records a function of nothing: what does its work again, and where the results then are."""
Make = Callable[[bool], Step]  # of a step that may look at the numbers that it computes, or that may not
Replay = Callable[[Make], Step]
"""Makes a step by the function that it is given, and perhaps others for recordings: two share no memory but the rows."""

KEPT = 8  # recordings: Poisson batches of about one size are padded to so many widths
WARM = 3  # runs before a recording, in which libraries choose their kernels


def plainly(make: Make) -> Step:
    """No recordings."""
    return make(True)


def replaying(device: torch.device, failed: Callable[[str], None]) -> Replay:
    """Recordings on ``device``, where it can make them; ``failed`` is told, once, why it could not."""
    if device.type != "cuda":
        return plainly
    return partial(replayed, capture=partial(captured, device), failed=failed)


def replayed(make: Make, capture: Capture, failed: Callable[[str], None]) -> Step:
    """A step that is recorded when its inputs have had the same shapes before, and replayed from then on.

    Where recording fails, all is done plainly from then on. Running out of memory is an error as without recordings.
    """
    plain, seen, kept, given_up = make(True), set[object](), OrderedDict[object, Step](), False

    def step(cast: Tree, memory: Tree, batches: Tree, live: Tensor, counts: Tensor) -> Tree:
        nonlocal given_up
        given = cast, memory, batches, live, counts
        key = shapes(given)
        if given_up or HOSTS_OWN in batches or key not in seen:
            seen.add(key)
            return plain(*given)
        if key not in kept:
            try:
                kept[key] = _recorded(make(False), given, capture)
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                given_up = True
                kept.clear()
                failed(f"no CUDA graph could be recorded: {error}".splitlines()[0])
                return plain(*given)
            if len(kept) > KEPT:
                kept.popitem(last=False)
        kept.move_to_end(key)
        return kept[key](*given)

    return step


def shapes(given: tuple[Any, ...]) -> object:
    """What must be the same for the same operations."""
    return tuple((name, x.shape, x.dtype) for name, x in tree.flatten(named(given)).items())


def named(given: tuple[Any, ...]) -> Tree:
    """What a step is given, as one tree."""
    return dict(zip(("cast", "memory", "batches", "live", "counts"), given, strict=True))


def _recorded(step: Step, example: tuple[Any, ...], capture: Capture) -> Step:
    buffers = tree.map(torch.clone, named(example))
    again, results = capture(lambda: step(*buffers.values()))

    def replay(*given: Any) -> Tree:
        tree.map(lambda buffer, x: buffer.copy_(x), buffers, named(given))
        again()
        return tree.map(torch.clone, results)  # the next replay overwrites them

    return replay


def captured(device: torch.device, run: Callable[[], Tree]) -> tuple[Callable[[], None], Tree]:
    """A :data:`Capture` by CUDA."""
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM):
                run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run()
    return graph.replay, results
