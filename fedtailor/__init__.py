"""fedtailor: organisations that may not share data tailor a model together. Federated learning in six pure functions."""

import fedtailor.airgap  # noqa: F401  (before anything can import flwr)
from fedtailor.strategy import STACK, SUM, Local, Reduce, Strategy

__all__ = ["STACK", "SUM", "Local", "Reduce", "Strategy"]
__version__ = "0.1.0"
