"""Arithmetic on trees: nested dicts of tensors, the one shape that parameters, updates and server state share."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Params = dict[str, Tensor]  # flat: the names of a state dict
Tree = dict[str, Any]  # nested dicts whose leaves are tensors


def map(fn: Callable[..., Tensor], *trees: Tree) -> Tree:
    """Apply ``fn`` leaf by leaf to trees of one structure.

    >>> map(lambda a, b: a + 2 * b, {"w": torch.ones(2)}, {"w": torch.ones(2)})
    {'w': tensor([3., 3.])}
    """
    return {
        key: (map if isinstance(value, dict) else _call)(fn, *(tree[key] for tree in trees))
        for key, value in trees[0].items()
    }


def _call(fn: Callable[..., Tensor], *xs: Tensor) -> Tensor:
    return fn(*xs)


def at(tree: Tree, index: int | slice | Tensor | None) -> Tree:
    """Index the leading axis of every leaf; ``None`` adds one."""
    return map(lambda x: x[index], tree)


def leaves(tree: Tree) -> list[Tensor]:
    """Every tensor of ``tree``, in key order of insertion."""
    return [x for v in tree.values() for x in (leaves(v) if isinstance(v, dict) else [v])]


def flatten(tree: Tree) -> dict[str, Tensor]:
    """Name every leaf by its path.

    >>> flatten({"delta": {"w": torch.ones(1)}})
    {'delta/w': tensor([1.])}
    """
    return dict(_paths("", tree))


def _paths(prefix: str, tree: Tree) -> Iterator[tuple[str, Tensor]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _paths(f"{prefix}{key}/", value)
        else:
            yield prefix + key, value


def unflatten(flat: dict[str, Tensor]) -> Tree:
    """The inverse of :func:`flatten`: empty branches are lost, because they hold nothing."""
    tree: Tree = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def bare(tree: Tree) -> Tree:
    """The tree without empty branches, as it comes back from a file.

    >>> bare({"of": {}, "w": torch.ones(1)})
    {'w': tensor([1.])}
    """
    return unflatten(flatten(tree))


def joined(*trees: Tree) -> Tree:
    """One tree with the leaves of all ``trees``; where two have one, the later's.

    >>> joined({"a": {"x": torch.zeros(1), "y": torch.zeros(1)}}, {"a": {"y": torch.ones(1)}})
    {'a': {'x': tensor([0.]), 'y': tensor([1.])}}
    """
    return unflatten({path: x for tree in trees for path, x in flatten(tree).items()})


def step(params: Tree, delta: Tree, scale: Tensor | float) -> Tree:
    """``params + scale * delta`` in the parameters' dtype, with no temporary copy where the dtypes agree."""
    return map(lambda p, d: torch.add(p, d.to(p.dtype), alpha=float(scale)), params, delta)


def lowered(tree: Tree, like: Tree) -> Tree:
    """``tree`` in the dtypes of ``like``, leaf by leaf, emptying ``tree`` on the way: never two whole copies at once.

    What ``like`` does not have, because a reduction made it, stays as it is.
    """
    out: Tree = {}
    for key in list(tree):
        leaf = tree.pop(key)
        if key not in like:
            out[key] = leaf
        else:
            out[key] = lowered(leaf, like[key]) if isinstance(leaf, dict) else leaf.to(like[key].dtype)
        del leaf
    return out


def finite(x: Tensor) -> bool:
    """Whether every value is finite, without a temporary copy: a NaN or an infinity shows in the least or the greatest.

    >>> finite(torch.tensor([1.0, float("nan")])), finite(torch.ones(0)), finite(torch.tensor([3]))
    (False, True, True)
    """
    if not x.is_floating_point() or not x.numel():
        return True
    low, high = x.aminmax()
    return bool(low.isfinite() & high.isfinite())


def norm(tree: Tree) -> Tensor:
    """The joint L2 norm of all leaves: a scalar."""
    return torch.stack([x.double().square().sum() for x in leaves(tree)]).sum().sqrt()


def clip(tree: Tree, bound: float | Tensor) -> Tree:
    """Scale ``tree`` so that its joint L2 norm is at most ``bound``; a tree that is not finite becomes zero.

    A NaN norm would otherwise pass any comparison and let the whole tree through unclipped.
    """
    total = norm(tree)
    scale = torch.where(total.isfinite(), (bound / (total + 1e-12)).clamp(max=1.0), 0.0)
    return map(lambda x: (x * scale).to(x.dtype).nan_to_num(0.0, 0.0, 0.0), tree)


def stack(trees: list[Tree]) -> Tree:
    """Stack trees along a new leading axis of clients: leaves ``[...]`` become ``[K, ...]``."""
    return map(lambda *xs: torch.stack(xs), *trees)
