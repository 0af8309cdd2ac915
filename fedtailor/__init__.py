"""fedtailor: organisations that may not share data tailor a model together. Federated learning in six pure functions."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import fedtailor.airgap  # noqa: F401  (before anything can import flwr)

if TYPE_CHECKING:
    from fedtailor.simulations.composed import simulate
    from fedtailor.strategy import STACK, SUM, Local, Reduce, Strategy

__all__ = ["STACK", "SUM", "Local", "Reduce", "Strategy", "simulate"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """What is in ``__all__``, at its first use: a training process confines itself before it imports torch."""
    if name in __all__:
        home = "fedtailor.simulations.composed" if name == "simulate" else "fedtailor.strategy"
        return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
