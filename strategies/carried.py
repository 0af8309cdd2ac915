"""What an object remembers, as tensors: a Flower strategy keeps its state in attributes, ours in a tree that is saved.

Only what has changed since the object was made is carried. A leaf's key is ``order:kind:name``, because a file keeps
neither the order of keys nor what a value was. Nothing is pickled, and nothing that cannot be carried is passed over.
"""

import copyreg
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedtailor import tree
from fedtailor.errors import ConfigError
from fedtailor.tree import Tree

CONTAINERS: dict[type, str] = {dict: "dict", list: "list", tuple: "tuple", ArrayRecord: "arrays"}
NUMBERS: dict[type, str] = {bool: "bool", int: "int", float: "float"}


def changed(now: object, was: object, path: str = "") -> Tree:
    """The attributes of ``now`` that differ from those of ``was``, the same object before it did anything.

    Raises:
        ConfigError: naming an attribute that changed and is neither a number, None, an array nor a dict, list or tuple
            of these, and every object that keeps something outside its attributes.
    """
    if not _plain(now):
        raise ConfigError(f"{path or type(now).__name__} keeps something outside its attributes (slots, or a C type)")
    there, before = vars(now), vars(was)
    if lost := before.keys() - there.keys():
        raise ConfigError(f"{path}{min(lost)} was deleted, which cannot be carried from round to round")
    found: Tree = {}
    for name, value in there.items():
        old, known = before.get(name), name in before
        if known and value is old:
            continue
        try:
            kind, content = _packed(value)
            if not known or not _same(kind, content, old):
                found[f"0:{kind}:{name}"] = content
        except TypeError as error:
            if type(value) is type(old) and _plain(value):
                if inside := changed(value, old, f"{path}{name}."):
                    found[f"0:object:{name}"] = inside
            elif not known or not _equal(value, old):
                raise ConfigError(f"{path}{name} changes and cannot be carried from round to round: {error}") from error
    return found


def restore(target: object, carried: Tree) -> None:
    """Give ``target``, as it was made, what :func:`changed` found."""
    for key, content in carried.items():
        _, kind, name = key.split(":", 2)
        if kind == "object":
            restore(vars(target)[name], content)
        else:
            vars(target)[name] = _unpacked(kind, content)


def array(x: Tensor) -> Array:
    """A tensor as Flower has it; bfloat16, which numpy lacks, as float32."""
    return Array((x.float() if x.dtype == torch.bfloat16 else x).detach().cpu().numpy())


def tensor(x: np.ndarray[Any, Any] | np.generic) -> Tensor:
    """A copy of numbers; TypeError where they are none."""
    return torch.from_numpy(np.array(x))


def _packed(value: Any) -> tuple[str, Tensor | Tree]:
    """A value's kind and its numbers; TypeError for what has none."""
    if value is None:
        return "none", torch.zeros(0)
    if type(value) in CONTAINERS:
        named = value.items() if isinstance(value, dict | ArrayRecord) else ((str(i), v) for i, v in enumerate(value))
        content: Tree = {}
        for order, (name, one) in enumerate(named):
            if not isinstance(name, str) or "/" in name:
                raise TypeError(f"a key that is {name!r}, not a string without a slash")
            kind, inside = _packed(one)
            content[f"{order}:{kind}:{name}"] = inside
        return CONTAINERS[type(value)], content or torch.zeros(0)
    if type(value) in NUMBERS:
        if type(value) is int and value.bit_length() > 63:
            raise TypeError(f"{value} has more than 64 bits")
        return NUMBERS[type(value)], torch.tensor(value, dtype=torch.double if type(value) is float else None)
    if isinstance(value, np.ndarray | np.generic):
        return ("numbers" if isinstance(value, np.ndarray) else "number"), tensor(value)
    if isinstance(value, Array):
        return "array", tensor(value.numpy())
    if isinstance(value, Tensor):
        return "tensor", value.detach().cpu().clone()
    raise TypeError(f"it is a {type(value).__name__}")


def _unpacked(kind: str, content: Tensor | Tree) -> Any:
    """The value of which :func:`_packed` made ``content``."""
    if kind in CONTAINERS.values():
        entries = content if isinstance(content, dict) else {}  # an empty container is an empty tensor
        named: dict[str, Any] = {}
        for key in sorted(entries, key=lambda key: int(key.partition(":")[0])):
            _, inside, name = key.split(":", 2)
            named[name] = _unpacked(inside, entries[key])
        if kind == "arrays":
            return ArrayRecord(named) if named else ArrayRecord()
        return named if kind == "dict" else list(named.values()) if kind == "list" else tuple(named.values())
    assert isinstance(content, Tensor)
    if kind == "none":
        return None
    if kind in NUMBERS.values():
        return content.item()
    if kind == "tensor":
        return content.clone()
    numbers = content.cpu().numpy().copy()
    return Array(numbers) if kind == "array" else numbers[()] if kind == "number" else numbers


def _same(kind: str, content: Tensor | Tree, old: Any) -> bool:
    """Whether what was packed is what ``old`` holds."""
    try:
        before, inside = _packed(old)
    except TypeError:
        return False
    one, other = tree.flatten({kind: content}), tree.flatten({before: inside})
    same = one.keys() == other.keys()
    return same and all(x.dtype == other[path].dtype and torch.equal(x, other[path]) for path, x in one.items())


def _equal(value: Any, old: Any) -> bool:
    try:
        return bool(value == old)
    except (TypeError, ValueError, RuntimeError):  # of arrays inside
        return False


def _plain(value: object) -> bool:
    """Whether a copy of an object's attributes is a copy of the object: Python's own protocol of copying says so."""
    try:
        copied = value.__reduce_ex__(2)
    except TypeError:  # it cannot be copied
        return False
    if isinstance(copied, str) or len(copied) != 5:
        return False
    how, made_of, state, *more = copied
    attributes = state is None or isinstance(state, dict) and state.keys() == vars(value).keys()
    return how is getattr(copyreg, "__newobj__", None) and len(made_of) == 1 and attributes and more == [None, None]
