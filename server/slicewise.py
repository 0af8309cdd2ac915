"""A round in slices: replies are added up in a file, and one checkpoint becomes the next, a few MB at a time.

What a coordinator holds of a model is then the same for a model of any size.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedtailor import tree
from fedtailor.errors import ConfigError
from fedtailor.store import Spec
from fedtailor.strategy import SUM, Elementwise, Reduce, Strategy, model_in
from fedtailor.tree import Tree
from fedtailor.treefile import Excerpt, Flat, TreeFile, scratch, slices_of, spec_of

STATE = "state/"  # where a strategy's state is in a checkpoint
DIVERGED = (
    "round {round}: the model is no longer finite; lower local.lr, or look at the sites' updates for one that "
    "is out of proportion. The checkpoint of the round before is kept"
)


def add(reduce: Reduce, acc: TreeFile | None, summand: Flat, weight: float, folder: Path) -> TreeFile:
    """``acc`` and ``weight`` times one more reply, where the reduction is a sum; a new one lies in ``folder``, nameless."""
    assert reduce.is_sum
    spec, fresh = spec_of(summand), acc is None
    if acc is None:  # float64, as sums are
        acc = scratch(folder, {path: (torch.float64, shape) for path, (_, shape) in spec.items()})
    for path in spec:
        for (start, stop), piece in zip(acc.slices(path), slices_of(summand, path), strict=True):
            so_far = None if fresh else {path: acc.read(path, start, stop)}
            acc.write(path, start, reduce.add(so_far, {path: (piece if weight == 1 else piece * weight)[None]})[path])
    return acc


def read(acc: TreeFile, like: Tree | None) -> Tree:
    """What was added up, in memory; in the dtypes of ``like`` where that has them, so that it takes half as much."""
    dtypes = {path: x.dtype for path, x in tree.flatten(like or {}).items()}
    out: dict[str, Tensor] = {}
    for path, span in acc.spans.items():
        out[path] = torch.empty(span.shape, dtype=dtypes.get(path, span.dtype))
        for start, stop in acc.slices(path):
            out[path].view(-1)[start:stop] = acc.read(path, start, stop)
    return tree.unflatten(out)


def can_be(strategy: Strategy) -> bool:
    """Whether a strategy's rounds can be applied by :func:`advance`."""
    return isinstance(strategy.apply, Elementwise) and strategy.reduce.done is SUM.done and strategy.reduce.is_sum


def advance(strategy: Strategy, total: TreeFile, before: TreeFile, after: TreeFile, round: int, like: Tree) -> None:
    """Apply ``total`` to the checkpoint ``before`` and write the next state to ``after``, which has its layout.

    Args:
        like: a summand; what was added up is given to the strategy in its dtypes.

    Raises:
        ConfigError: code ``diverged``, if the next state is not finite.
    """
    shapes = {path.removeprefix(f"{STATE}params/"): span.shape for path, span in before.spans.items()
              if path.startswith(f"{STATE}params/")}  # fmt: skip
    states, totals = _branches(before, shapes), _branches(total, shapes)
    whole = _rest(before, states)
    beside = _rest(total, totals)
    for name in shapes:
        for start, stop in before.slices(f"{STATE}params/{name}"):
            state = tree.unflatten(whole | {f"{b}{name}": before.read(f"{b}{name}", start, stop) for b in states})
            part = tree.unflatten(beside | {f"{b}{name}": total.read(f"{b}{name}", start, stop) for b in totals})
            made = {"state": strategy.apply(state["state"], tree.lowered(part, like), round)}
            kept = {}
            for path, leaf in tree.flatten(made).items():
                if not tree.finite(leaf):
                    raise ConfigError(DIVERGED.format(round=round), code="diverged")
                if path.removesuffix(name) in states:
                    after.write(path, start, leaf)
                else:
                    kept[path] = leaf
            assert kept.keys() == whole.keys(), "a state whose tensors change their names"
    for path, leaf in kept.items():
        after.write(path, 0, leaf)


def _branches(file: TreeFile, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The beginnings of the paths under which ``file`` has a tensor for each parameter, of its shape."""
    first = next(iter(shapes))
    ends = [path.removesuffix(first) for path in file.spans if path == first or path.endswith(f"/{first}")]
    return [
        branch
        for branch in ends
        if all((span := file.spans.get(branch + name)) and span.shape == shape for name, shape in shapes.items())
    ]


def _rest(file: TreeFile, branches: list[str]) -> dict[str, Tensor]:
    beginnings = {path: path.rpartition("/")[0] + "/" * ("/" in path) for path in file.spans}
    return {path: file.whole(path) for path, branch in beginnings.items() if branch not in branches}


def cast(strategy: Strategy, saved: TreeFile, *, model: bool = False) -> Excerpt | None:
    """What ``strategy`` broadcasts of a checkpoint, or of that the model to evaluate, as a file that is not made.

    None where that is not known to be a choice among the checkpoint's tensors.
    """
    if not isinstance(strategy.apply, Elementwise):
        return None
    named = {path: _nothing(span.dtype, span.shape) for path, span in saved.spans.items()}
    paths = {id(leaf): path for path, leaf in named.items()}
    chosen = strategy.broadcast(tree.unflatten(named)["state"])
    flat = tree.flatten(model_in(chosen) if model else chosen)
    if any(id(leaf) not in paths for leaf in flat.values()):
        return None
    return Excerpt(saved, {name: paths[id(leaf)] for name, leaf in flat.items()})


def shaped(spec: Spec) -> Tree:
    """A tree of these dtypes and shapes, without memory."""
    return tree.unflatten({path: _nothing(dtype, shape) for path, (dtype, shape) in spec.items()})


def _nothing(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros((), dtype=dtype).expand(shape)
