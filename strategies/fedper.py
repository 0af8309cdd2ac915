"""FedPer: a shared body and a head of one's own. Arivazhagan et al. 2019, https://arxiv.org/abs/1912.00818."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from pydantic import validate_call

from fedtailor import Local, Strategy
from fedtailor.errors import ConfigError
from fedtailor.strategies.inner import FEDAVG, Shared, inner
from fedtailor.strategy import model_in
from fedtailor.tree import Tree


@validate_call
def fedper(of: Shared = FEDAVG, own: Sequence[str] = ("*head*",)) -> Strategy:
    """Share some parameters and leave the others to each site, which keeps them and never sends them.

    Args:
        of: the strategy for the shared parameters.
        own: patterns, as in file names, of the parameters that are the site's own: ``*head*`` for a head (FedPer),
            ``*norm*`` for the layers that normalise (FedBN), ``*lora_*`` for adapters.
    """

    def split(params: Tree) -> tuple[Tree, Tree]:
        mine = {name for name in params if any(fnmatchcase(name, pattern) for pattern in own)}
        return {k: v for k, v in params.items() if k not in mine}, {k: v for k, v in params.items() if k in mine}

    def shared(params: Tree) -> Tree:
        both = split(params)
        if not all(both):
            raise ConfigError(f"own: {list(own)} matches {'all' if both[1] else 'none'} of {', '.join(sorted(params))}")
        return both[0]

    def inside(cast: Tree) -> Tree:
        return {**cast, "params": split(cast["params"])[0]}

    def broadcast(state: Tree) -> Tree:  # what is the sites' own travels as it began, so that whoever joins has it
        cast = of.broadcast({k: v for k, v in state.items() if k != "own"})
        return {k: v | state["own"] if k in ("params", "model") else v for k, v in cast.items()}

    def start(cast: Tree, memory: Tree) -> Tree:
        return {**cast["params"], **memory["own"]}

    def correct(grads: Tree, params: Tree, cast: Tree, memory: Tree) -> Tree:
        return grads | of.correct(split(grads)[0], split(params)[0], inside(cast), inner(memory))

    def report(local: Local) -> tuple[Tree, Tree]:
        body, head = split(local.params)
        summand, kept = of.report(local._replace(cast=inside(local.cast), memory=inner(local.memory), params=body))
        return summand, {"own": head, "of": kept}

    return of._replace(
        init=lambda params: of.init(shared(params)) | {"own": split(params)[1]},
        broadcast=broadcast,
        remember=lambda params: {"own": split(params)[1], "of": of.remember(shared(params))},
        start=start,
        correct=correct,
        report=report,
        apply=lambda state, total, round: of.apply(state, total, round) | {"own": state["own"]},
        personal=lambda cast, memory: {**model_in(cast), **memory["own"]},
    )
