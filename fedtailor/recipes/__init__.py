"""The recipes that ship with fedtailor."""

from fedtailor.recipes.tabular import tabular

__all__ = ["tabular"]
