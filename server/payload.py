"""A payload on disk, mapped a tensor at a time: a reply of any size takes the memory of its largest tensor."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from fedtailor import tree
from fedtailor.strategy import Reduce
from fedtailor.tree import Tree


class Payload(Mapping[str, Tensor]):
    """A safetensors file's tensors by path. Each is mapped anew when it is asked for, and given back when it is dropped.

    Raises:
        SafetensorError, OSError: if the file is none, or is gone.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with safe_open(path, framework="pt") as file:
            self._names = list(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._path, framework="pt") as file:
            found: Tensor = file.get_tensor(name)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def fold(reduce: Reduce, acc: Tree | None, summand: Mapping[str, Tensor]) -> Tree:
    """``acc`` and one more reply. A sum takes it tensor by tensor, and is by path until it is :func:`whole`."""
    if not reduce.is_sum:
        return reduce.add(acc, tree.at(tree.unflatten(dict(summand)), None))
    out: Tree = {}
    for path in summand:
        out |= reduce.add(acc and {path: acc[path]}, {path: summand[path][None]})
    return out


def whole(reduce: Reduce, acc: Tree | None) -> Tree | None:
    """What :func:`fold` made of a round's replies, as the reduction's own ``done`` takes it."""
    return tree.unflatten(acc) if acc and reduce.is_sum else acc
