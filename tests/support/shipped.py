"""Every strategy that a YAML file names, shipped or of an installed plug-in, and its private form."""

from collections.abc import Iterable

import torch
from forms import private_forms

from fedtailor import Strategy, tree
from fedtailor.config import build, choices, load
from fedtailor.tree import Tree

SPECS = {name: load([f"strategy={name}"]).plan.strategy for name in choices("strategy")}
SHIPPED = {name: build(spec, Strategy) for name, spec in SPECS.items()}
PRIVATE = private_forms(SHIPPED)


def fold(strategy: Strategy, replies: Iterable[Tree]) -> Tree:
    """What a coordinator does: one reply is a block of one."""
    acc = None
    for reply in replies:
        acc = strategy.reduce.add(acc, tree.at(reply, None))
    assert acc is not None
    return strategy.reduce.done(acc)


def copied(of: Tree) -> Tree:
    return tree.map(torch.clone, of)


def assert_close(a: Tree, b: Tree, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    one, other = tree.flatten(a), tree.flatten(b)
    assert one.keys() == other.keys()
    for path in one:
        torch.testing.assert_close(
            one[path], other[path], rtol=rtol, atol=atol, msg=lambda text, p=path: f"{p}: {text}"
        )
