"""A block's work compiled by torch's compiler for inputs of some shapes: for small models, whose steps are mostly overhead.

What is compiled is the list of operations that all of a block's steps come to, written down while they are done once. A
step that looks at its own numbers could be written down for those alone, and is not compiled. Noise that the host draws
is drawn beforehand. Unlike a replay by CUDA, what is compiled rounds a little differently; so that a run repeats bit for
bit, resumed or not, the first block of some shapes is compiled already.
"""

import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedtailor import tree
from fedtailor.config import Steps
from fedtailor.errors import ConfigError
from fedtailor.simulations.engine import out_of_memory
from fedtailor.simulations.feed import Feed
from fedtailor.simulations.graphs import KEPT, Make, Replay, Step, named, plainly, replaying, shapes
from fedtailor.simulations.hardware import HOSTS_OWN
from fedtailor.tree import Tree

FOLDER = "TORCHINDUCTOR_CACHE_DIR"
MOST = 1 << 26  # numbers of noise of a block's steps: so many may be drawn beforehand


def replay_of(steps: Steps, device: torch.device, feed: Feed, failed: Callable[[str], None]) -> Replay:
    """How a block's steps are done; ``failed`` is told, once, why not so.

    Raises:
        ConfigError: if they cannot be compiled here.
    """
    if steps != "compiled":
        return plainly if steps == "plain" else replaying(device, failed)
    if device.type != "cpu":
        raise ConfigError(f"simulation.steps: compiled, which is for the CPU; on {device} use graphs")
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"simulation.steps: compiled, but there is no C++ compiler {compiler!r}; install it, or use plain"
        )
    _alone()
    return lambda make: compiled(make, feed, failed)


def compiled(make: Make, feed: Feed, failed: Callable[[str], None]) -> Step:
    """A step that is compiled for each of the shapes of its inputs. Where that fails, all is done plainly from then on."""
    plain, kept, given_up = make(True), OrderedDict[object, Step](), False

    def step(cast: Tree, memory: Tree, batches: Tree, live: Tensor, counts: Tensor) -> Tree:
        nonlocal given_up
        if HOSTS_OWN in batches and live.numel() * sum(p.numel() for p in tree.leaves(feed.like)) > MOST:
            return plain(cast, memory, batches, live, counts)
        given = cast, memory, feed.drawn(batches), live, counts
        if given_up:
            return plain(*given)
        key = shapes(given)
        if key not in kept:
            try:
                kept[key], found = _compiled(make(False), given)
            except Exception as error:  # whatever a model's code, or the compiler, does not do
                if out_of_memory(error):
                    raise
                given_up = True
                kept.clear()
                failed(f"its steps could not be compiled: {type(error).__name__}: {error}".splitlines()[0])
                return plain(*given)
            if len(kept) > KEPT:
                kept.popitem(last=False)
            return found
        kept.move_to_end(key)
        return kept[key](*given)

    return step


def _compiled(step: Step, example: tuple[Any, ...]) -> tuple[Step, Tree]:
    """The step, compiled, and what comes of ``example``."""
    from torch.fx.experimental.proxy_tensor import make_fx

    names, results = list(tree.flatten(named(example))), list[str]()

    def written(*leaves: Tensor) -> list[Tensor]:
        whole = named(({}, {}, {}, None, None)) | tree.unflatten(dict(zip(names, leaves, strict=True)))
        found = tree.flatten(step(*whole.values()))
        results[:] = found
        return list(found.values())

    operations = make_fx(written)(*tree.flatten(named(example)).values())
    operations.graph.eliminate_dead_code()
    operations.recompile()
    run = torch.compile(operations, dynamic=False, fullgraph=True)

    def compiled_step(*given: Any) -> Tree:
        with torch.no_grad():
            found = run(*tree.flatten(named(given)).values())
        return {"summand": {}, "memory": {}} | tree.unflatten(dict(zip(results, found, strict=True)))

    return compiled_step, compiled_step(*example)


def _alone() -> None:
    """Have the compiler keep what it makes in a folder of this user's, start no processes and read no pickles."""
    from torch._functorch import config as autograd
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fedtailor" / "inductor"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="fedtailor-inductor-"))
    if os.environ.get(FOLDER, default_cache_dir()) == default_cache_dir():  # torch puts it there itself
        os.environ[FOLDER] = str(folder)
    config.compile_threads = 1
    config.fx_graph_cache = False
    autograd.enable_autograd_cache = False
