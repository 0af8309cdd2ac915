"""Compression with error feedback, what the wrappers share. Karimireddy et al. 2019, https://arxiv.org/abs/1901.09847.

A client sends a coarse form of what it has to say and keeps the difference, which it adds to what it says next time; so
nothing is lost, only late. What is sent is a dense tensor of few or mostly zero values, which the site's daemon packs
without loss. What a server casts is not shrunk.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fedtailor import Local, Strategy, tree
from fedtailor.strategies.inner import inner, nothing
from fedtailor.tree import Tree

Shrink = Callable[[Tree, Tensor | None], Tree]  # what there is to say, the round's seed -> what is sent


def with_feedback(of: Strategy, shrink: Shrink) -> Strategy:
    """``of``, whose summands are shrunk. Single numbers beside the tensors, such as a weight, pass as they are."""

    def report(local: Local) -> tuple[Tree, Tree]:
        summand, memory = of.report(local._replace(memory=inner(local.memory)))
        wanted = tree.map(torch.add, _tensors(summand), local.memory["error"])
        sent = shrink(wanted, local.seed)
        error = tree.map(torch.sub, wanted, sent)
        return summand | sent, {"error": error, "of": memory}

    def correct(grads: Tree, params: Tree, cast: Tree, memory: Tree) -> Tree:
        return of.correct(grads, params, cast, inner(memory))

    def remember(params: Tree) -> Tree:
        return {"error": _tensors(nothing(of, params)), "of": of.remember(params)}

    own = of.personal
    return of._replace(
        report=report,
        correct=correct,
        remember=remember,
        start=lambda cast, memory: of.start(cast, inner(memory)),
        personal=None if own is None else lambda cast, memory: own(cast, inner(memory)),
        packed=True,
    )


def _tensors(summand: Tree) -> Tree:
    return {k: v for k, v in summand.items() if isinstance(v, dict)}
