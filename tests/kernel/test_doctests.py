"""Every example in a docstring is true."""

import doctest
import importlib
import pkgutil

import pytest

import fedtailor

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(fedtailor.__path__, "fedtailor.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
