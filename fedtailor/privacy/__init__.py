"""Differential privacy: what may be claimed, what it costs, and the randomness that it rests on."""

from fedtailor.privacy.site_level import private

__all__ = ["private"]
