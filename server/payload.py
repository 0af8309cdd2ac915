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

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def fold(reduce: Reduce, acc: Tree | None, summand: Mapping[str, Tensor]) -> Tree:
    """``acc`` and one more reply, both by path. A sum takes it tensor by tensor; what is not a sum keeps all of it."""
    if not reduce.is_sum:
        whole = tree.unflatten(dict(summand))
        return tree.flatten(reduce.add(acc and tree.unflatten(acc), tree.at(whole, None)))
    out: Tree = {}
    for path in summand:
        out |= reduce.add(acc and {path: acc[path]}, {path: summand[path][None]})
    return out
