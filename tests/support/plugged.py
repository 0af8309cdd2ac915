"""Plug-ins as an installer leaves them, in a folder of a test's own; their modules tell when they are imported."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedtailor import leaving, plugins, proposal
from fedtailor.client import work

# Beside its package it leaves a file, where it may write; a confined process may not, but has a log.
MODULE = """
import os, sys
from pathlib import Path
from pydantic import PositiveFloat, validate_call
from fedtailor import Strategy
from fedtailor.strategies.fedavg import fedavg

sys.stderr.write("HERE I AM\\n")
try:
    Path(__file__).parents[1].joinpath("imported").write_text("HERE I AM")
except OSError:
    pass

@validate_call
def mine(server_lr: PositiveFloat = 1.0) -> Strategy:
    return fedavg(server_lr)
"""


class Folder:
    """A folder of ``sys.path`` into which plug-ins are installed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def install(
        self,
        name: str,
        code: str = MODULE,
        *,
        yaml: dict[str, str] | None = None,
        entry: str | None = None,
        version: str = "1.0",
        **more: str,
    ) -> Path:
        """Install a package with its module's code; its folder.

        Args:
            yaml: text by group/choice; default: the strategy of its own name.
            entry: what its entry point says; default: name = name.
            more: text of other modules, by their dotted name with __ for dots.
        """
        package = self.path / name
        files = {package / "__init__.py": code}
        files |= {self.path / f"{module.replace('__', '/')}.py": text for module, text in more.items()}
        said = {f"strategy/{name}": f"_target_: {name}.mine\nserver_lr: 1.0\n"} if yaml is None else yaml
        files |= {package / "configs" / f"{choice}.yaml": text for choice, text in said.items()}
        about = self.path / f"{name}-{version}.dist-info"
        listed = [str(path.relative_to(self.path)) for path in files] + [f"{about.name}/RECORD"]
        files[about / "METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        files[about / "entry_points.txt"] = f"[fedtailor.plugins]\n{entry or f'{name} = {name}'}\n"
        files[about / "RECORD"] = "".join(f"{path},,\n" for path in listed)
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return package

    @property
    def imported(self) -> bool:
        """Whether a plug-in's module has run, in a process that may write here, since the last :func:`forget`."""
        return (self.path / "imported").exists()

    def forget(self) -> None:
        """As in a new process: nothing is imported, and nobody has said what may be."""
        (self.path / "imported").unlink(missing_ok=True)
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", "")).startswith(str(self.path)):
                del sys.modules[name]
        plugins._loaded.clear()
        plugins._approved = None
        for cache in (proposal.code_of, leaving.agreed, work.prepared):
            cache.cache_clear()


@contextmanager
def folder(at: Path) -> Iterator[Folder]:
    """Such a folder, empty, also for the processes that are started meanwhile."""
    at.mkdir(exist_ok=True)
    made = Folder(at)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "_approved", None)
        patch.setenv("PYTHONPATH", str(at), prepend=":")
        patch.syspath_prepend(str(at))
        yield made
        made.forget()
