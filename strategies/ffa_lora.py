"""FFA-LoRA: adapters with a frozen half. Sun et al. 2024, https://arxiv.org/abs/2403.12313."""

from pydantic import validate_call

from fedtailor import Local, Strategy
from fedtailor.adapters import LORA_A, is_part
from fedtailor.strategies.inner import FEDAVG, Shared
from fedtailor.tree import Params, Tree


@validate_call
def ffa_lora(of: Shared = FEDAVG) -> Strategy:
    """Train and send only the second half of each adapter: what is averaged is then exact, and noise enters once.

    The first half stays where it started and is cast with the rest; ``of`` never sees it. Without adapters it is ``of``.

    Args:
        of: the strategy that the other parameters go by.
    """
    if "lora_a" in of.init({}):
        raise ValueError("of: it freezes the first half of adapters already")

    def report(local: Local) -> tuple[Tree, Tree]:
        return of.report(local._replace(params=_rest(local.params), cast=_inside(local.cast)))

    def broadcast(state: Tree) -> Tree:
        frozen, cast = state.get("lora_a", {}), of.broadcast(_state(state))  # a file keeps no empty branch
        return {k: v | frozen if k in ("params", "model") else v for k, v in cast.items()}

    def apply(state: Tree, total: Tree, round: int) -> Tree:
        return of.apply(_state(state), total, round) | {"lora_a": state.get("lora_a", {})}

    return of._replace(
        init=lambda params: of.init(_rest(params)) | {"lora_a": {k: v for k, v in params.items() if _is_a(k)}},
        broadcast=broadcast,
        remember=lambda params: of.remember(_rest(params)),
        correct=lambda grads, params, cast, memory: of.correct(grads, _rest(params), _inside(cast), memory),
        report=report,
        apply=apply,
        trains=lambda name: of.trains(name) and not _is_a(name),
    )


def _is_a(name: str) -> bool:
    return is_part(name, LORA_A)


def _rest(params: Params) -> Params:
    return {name: p for name, p in params.items() if not _is_a(name)}


def _inside(cast: Tree) -> Tree:
    return {k: _rest(v) if k in ("params", "model") else v for k, v in cast.items()}


def _state(state: Tree) -> Tree:
    return {k: v for k, v in state.items() if k != "lora_a"}
