"""Flower's own strategies, run as they are. Beutel et al. 2020, https://arxiv.org/abs/2007.14390.

Flower is imported when one is made, and not before: whoever does not use one does not pay for it.
"""

import difflib
import inspect
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError, validate_call

from fedtailor import Strategy
from fedtailor.errors import ConfigError


@validate_call
def flower(
    algorithm: str = "FedAvg",
    arguments: dict[str, Any] | None = None,
    weighting: Literal["examples", "equal"] = "examples",
) -> Strategy:
    """Flower's own code as it is, in our rounds: to compare with, or to bring along; keeps every reply in memory.

    Args:
        algorithm: the name of a class of ``flwr.serverapp.strategy``.
        arguments: numbers that the class takes; who takes part is the plan's.
        weighting: ``examples`` tells it the rows that each client says it has; ``equal`` counts every client once.
    """
    from fedtailor.strategies.flower_adapter import BUILT_IN, REFUSED, from_flower

    if algorithm in REFUSED:
        raise ConfigError(f"flower: algorithm: {algorithm} is refused: {REFUSED[algorithm]}", code="refused")
    known = [name for name in BUILT_IN if name not in REFUSED and not inspect.isabstract(BUILT_IN[name])]
    if algorithm not in known:
        raise ConfigError(f"flower: algorithm: Flower has no {algorithm!r}{_nearest(algorithm, known)}")
    kind = BUILT_IN[algorithm]
    given = _checked(kind, BUILT_IN["FedAvg"], arguments or {})
    try:
        made = kind(**given, min_train_nodes=1, min_available_nodes=1)  # who takes part is the plan's
    except (TypeError, ValueError) as error:
        raise ConfigError(f"flower: arguments: {algorithm}: {error}") from error
    return from_flower(made, weighting=weighting)


def _checked(kind: type, common: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a class of Flower's: numbers and texts that it has beyond FedAvg's; ConfigError names what is wrong."""
    every = inspect.signature(kind, eval_str=True).parameters
    own = {n: p for n, p in every.items() if n not in inspect.signature(common).parameters and n != "selection_rule"}
    where, checked = f"flower: arguments: {kind.__name__}", {}
    for name, value in arguments.items():
        if name.endswith(("_fn", "_rule")) and name in every:
            raise ConfigError(f"{where}: {name} is a function, which no plan can name; in Python: from_flower(…)")
        if name in every and name not in own:
            raise ConfigError(f"{where}: {name}: the plan's sites and quorum say who takes part, the wire what is sent")
        if name not in own:
            raise ConfigError(f"{where}: there is no {name!r}{_nearest(name, sorted(own))}")
        try:
            checked[name] = TypeAdapter(own[name].annotation, config=ConfigDict(allow_inf_nan=False)).validate_python(
                value
            )
        except ValidationError as error:
            raise ConfigError(f"{where}: {name}: {error.errors()[0]['msg']} (got {value!r:.80})") from error
    if missing := [n for n, p in own.items() if p.default is p.empty and n not in checked]:
        raise ConfigError(f"{where}: {missing[0]} must be given")
    return checked


def _nearest(word: str, words: list[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return (
        f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(words)}" if words else "; it takes none"
    )
