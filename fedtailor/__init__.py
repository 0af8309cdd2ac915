"""fedtailor: organisations that may not share data tailor a model together. Federated learning in six pure functions."""

from typing import TYPE_CHECKING, Any

import fedtailor.airgap  # noqa: F401  (before anything can import flwr)

if TYPE_CHECKING:
    from fedtailor.strategy import STACK, SUM, Local, Reduce, Strategy

__all__ = ["STACK", "SUM", "Local", "Reduce", "Strategy"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """What is in ``__all__``, at its first use: a training process confines itself before it imports torch."""
    if name in __all__:
        import fedtailor.strategy

        return getattr(fedtailor.strategy, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
