"""Strategies made of strategies: what a wrapper takes, and what it must know of it."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import PlainValidator

from fedtailor import Strategy, tree
from fedtailor.config import build
from fedtailor.errors import ConfigError
from fedtailor.strategies.fedavg import fedavg
from fedtailor.strategy import standing
from fedtailor.study import Spec
from fedtailor.tree import Tree

FEDAVG = fedavg()  # what every wrapper wraps where nothing else is said
DEPTH = 8  # wrappers in each other, at most: a plan comes from the coordinator, and recursion has an end


def _strategy(value: Any) -> Strategy:
    """A strategy, its name in the catalogue, or its name and arguments: ``{name: krum, attackers: 2}``."""
    depth, within = 0, value
    while isinstance(within, Mapping):
        depth, within = depth + 1, within.get("of")
    if depth > DEPTH:
        raise ValueError(f"{depth} strategies in each other; at most {DEPTH}")
    if isinstance(value, Strategy):
        found = value
    else:
        named = value if isinstance(value, Mapping) else {"name": value}
        if not isinstance(named.get("name"), str):
            raise ValueError("a strategy is named as in fedavg, or with its arguments as in {name: krum, attackers: 2}")
        spec = {k: v for k, v in named.items() if k != "name"} | {"_target_": f"fedtailor.strategies.{named['name']}"}
        try:
            found = build(Spec.model_validate(spec), Strategy)
        except ConfigError as error:
            raise ValueError(str(error)) from error
    if found.sensitivity is not None:
        raise ValueError(
            "it is private already: what is done to its summands inside would void their bound; wrap first"
        )
    return found


def _shared(value: Any) -> Strategy:
    found = _strategy(value)
    if found.personal is not None:
        raise ValueError("it gives each site a model of its own, and must go round this one, not inside it")
    return found


Inner = Annotated[Strategy, PlainValidator(_strategy)]
Shared = Annotated[Strategy, PlainValidator(_shared)]  # for what must know which model a gradient or a change is of


def inner(memory: Tree) -> Tree:
    """What the strategy inside remembers, where a wrapper remembers too; a file keeps no empty branch."""
    found: Tree = memory.get("of", {})
    return found


def values(summand: Tree) -> Tree:
    """A summand without its weight: what a client says, and not how much it counts."""
    return {k: v for k, v in summand.items() if k != "weight"}


def nothing(of: Strategy, params: Tree) -> Tree:
    """The values of a summand of ``of``, all zero."""
    return tree.map(lambda x: x.new_zeros(x.shape), values(standing(of, params)))
