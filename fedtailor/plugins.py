"""Third-party strategies and recipes: installed packages that name a module in the entry-point group ``fedtailor.plugins``.

To find them reads metadata and runs none of their code. A module is imported when a plan names a factory of it, and in
a site's processes only while the site's policy approves the SHA-256 of its files (:func:`only`).
"""

import hashlib
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from pkgutil import get_importer
from types import ModuleType
from typing import Any, NamedTuple

from fedtailor.errors import ConfigError, RefusedError
from fedtailor.study import Plan

GROUP = "fedtailor.plugins"
OFFERS = ("recipe", "strategy", "study")  # the config groups that a plug-in may add to
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")  # of a plug-in, and of its YAML files: as study.Name

_loaded: dict[Path, str] = {}  # a plug-in's folder -> SHA-256 of its files when this process first imported from it
_approved: Mapping[str, str] | None = None


class Code(NamedTuple):
    """Third-party code that a plan runs, as it is installed here; without a SHA-256 it is not."""

    name: str
    version: str = ""
    sha256: str = ""

    def __str__(self) -> str:
        return (
            f"{self.name} {self.version}, sha256 {self.sha256}" if self.sha256 else f"{self.name}, not installed here"
        )


class Plugin(NamedTuple):
    """An installed plug-in, found and not imported."""

    name: str  # of the entry point
    module: str
    package: str  # the distribution
    version: str
    file: Path  # of the module
    root: Path  # the folder of the top-level package that the module is in
    recorded: dict[str, Path]  # what else was installed with it, by its name below site-packages

    @property
    def configs(self) -> Path:
        """The folder of YAML beside the module, if there is one."""
        return self.file.parent / "configs"

    def code(self) -> Code:
        """What a site approves."""
        return Code(self.name, self.version, self.sha256())

    def sha256(self) -> str:
        """SHA-256, hexadecimal, over names and contents of all files of the package's folder and of its distribution.

        All of them, because a module may import any other. Left out: Python's caches, which are not read (see
        :func:`factory`), and what the installer writes. Other distributions that it imports are not covered.

        Raises:
            ConfigError: if a file cannot be read, or one is a link, which could lead anywhere.
        """
        total = hashlib.sha256()
        try:
            for name, path in sorted(self._files().items()):
                total.update(f"{len(name)}:{name}".encode() + hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise ConfigError(f"plug-in {self.name}: {error.filename} cannot be read: {error.strerror}") from error
        return total.hexdigest()

    def _files(self) -> dict[str, Path]:
        found = {name: path for name, path in self.recorded.items() if path.is_file()}
        for at, folders, names in os.walk(self.root):
            folders[:] = [name for name in folders if name != "__pycache__"]
            for path in (Path(at, name) for name in (*folders, *names)):
                if path.is_symlink():
                    raise ConfigError(f"plug-in {self.name}: {path} is a link; install the files themselves")
            found |= {Path(at, name).relative_to(self.root.parent).as_posix(): Path(at, name) for name in names}
        return found

    def adds(self) -> dict[str, list[str]]:
        """The choices that its YAML files add to each config group.

        Raises:
            ConfigError: naming a file in another group, or one whose name is no choice's.
        """
        added: dict[str, list[str]] = {}
        for path in sorted(self.configs.rglob("*.yaml")):
            group = path.parent.relative_to(self.configs).as_posix()
            if group not in OFFERS or not NAME.fullmatch(path.stem):
                raise ConfigError(
                    f"plug-in {self.name}: {path} adds nothing; a plug-in's YAML is configs/GROUP/NAME.yaml, GROUP one "
                    f"of {', '.join(OFFERS)}, NAME of small letters, digits, _ . -"
                )
            added.setdefault(group, []).append(path.stem)
        return added


def entries() -> Iterator[EntryPoint]:
    """What installed packages name in the group."""
    yield from entry_points(group=GROUP)


def installed() -> list[Plugin]:
    """All plug-ins there are.

    Raises:
        ConfigError: naming the first whose entry is malformed or leads nowhere.
    """
    return [located(entry) for entry in entries()]


def find(module: str) -> Plugin | None:
    """The plug-in that offers exactly this module; None if none does.

    Raises:
        ConfigError: if more than one does, or it cannot be located.
    """
    named = [entry for entry in entries() if entry.value.strip() == module]
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(map(_whose, named))} name one module, {module}; uninstall one of them")
    return located(named[0]) if named else None


def of(plan: Plan) -> list[Plugin]:
    """The plug-ins whose factories a plan names."""
    modules = {spec.target.rpartition(".")[0] for spec in (plan.recipe, plan.strategy)}
    found = (find(module) for module in sorted(modules) if module.split(".")[0] != "fedtailor")
    return [plugin for plugin in found if plugin is not None]


def located(entry: EntryPoint) -> Plugin:
    """Find the module that an entry names, as Python would, and import nothing on the way.

    Raises:
        ConfigError: saying what is wrong with it.
    """
    module, parts = entry.value.strip(), entry.value.strip().split(".")
    if not NAME.fullmatch(entry.name) or not all(part.isidentifier() for part in parts) or parts[0] == "fedtailor":
        raise ConfigError(f'{_whose(entry)} is malformed: write name = "package.module", the name in small letters')
    spec = _spec(parts)
    top = spec[0].origin if spec and spec[0].submodule_search_locations else None
    if top is None or spec[-1].origin is None or not Path(top).is_file() or not Path(spec[-1].origin).is_file():
        raise ConfigError(
            f"{_whose(entry)}: {module} is not found as a file in a package (a folder with __init__.py); mend the "
            f"package, or pip uninstall it"
        )
    dist = entry.dist
    assert dist is not None
    recorded = {
        file.as_posix(): Path(str(file.locate()))
        for file in dist.files or ()
        if not {"..", "__pycache__"} & set(file.parts) and not file.parts[0].endswith((".dist-info", ".egg-info"))
    }
    version = re.sub(r"[^\w.+!-]", "?", dist.version)
    return Plugin(entry.name, module, dist.name, version, Path(spec[-1].origin), Path(top).parent, recorded)


def _whose(entry: EntryPoint) -> str:
    whose = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "nobody"
    return f"the entry {entry.name!r} = {entry.value!r} of {whose}"


def _spec(parts: list[str]) -> list[ModuleSpec]:
    """Where each of the packages and the module lie; empty where one does not."""
    try:
        found = [find_spec(parts[0])]
    except ValueError:  # a module that was made by hand
        return []
    for i in range(1, len(parts)):  # not find_spec: it imports the packages above
        above = found[-1].submodule_search_locations if found[-1] else None
        finder = get_importer(list(above)[0]) if above else None
        found.append(finder.find_spec(".".join(parts[: i + 1])) if finder else None)
    return [] if None in found else typing.cast(list[ModuleSpec], found)


def only(approved: Mapping[str, str]) -> None:
    """From now on this process imports no plug-in but these, by name and SHA-256. Every process of a site says so first.

    A coordinator and a simulator import what their user installed and a plan names.
    """
    global _approved
    _approved = approved


def factory(plugin: Plugin, name: str) -> Callable[..., Any]:
    """Import a plug-in's module and return a factory of it: a public function, defined there, that is annotated to
    return a Strategy or a Recipe.

    It is compiled from the files that were hashed: a cache beside them could hold other code.

    Raises:
        RefusedError: code ``plugin``, before anything is imported, if :func:`only` does not name it as it is now.
        ConfigError: if it was changed since this process imported it, cannot be imported, or has no such factory.
    """
    found = plugin.sha256()
    if _approved is not None and _approved.get(plugin.name) != found:
        raise RefusedError(f"policy.plugins does not approve {plugin.code()}; see: fedtailor plugins", code="plugin")
    if _loaded.setdefault(plugin.root, found) != found:
        raise ConfigError(f"plug-in {plugin.name} was changed after this process had loaded it; start it again")
    try:
        with _without_caches():
            module = import_module(plugin.module)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"plug-in {plugin.name} {plugin.version}: importing {plugin.module} fails: {type(error).__name__}: {error}"
        ) from error
    if not (module.__file__ and Path(module.__file__).samefile(plugin.file)):
        raise ConfigError(
            f"plug-in {plugin.name}: {plugin.module} was loaded from {module.__file__}, not {plugin.file}"
        )
    offered = _factories(module)
    if name not in offered:
        listed = ", ".join(sorted(offered)) or "none"
        raise ConfigError(
            f"{plugin.module}.{name}: plug-in {plugin.name} has no such factory, a function defined there with -> "
            f"Strategy or -> Recipe; it has {listed}",
            code="unknown",
        )
    return offered[name]


@contextmanager
def _without_caches() -> Iterator[None]:
    before = sys.pycache_prefix, sys.dont_write_bytecode
    sys.pycache_prefix, sys.dont_write_bytecode = os.devnull, True
    try:
        yield
    finally:
        sys.pycache_prefix, sys.dont_write_bytecode = before


def _factories(module: ModuleType) -> dict[str, Callable[..., Any]]:
    from fedtailor.recipe import Recipe  # torch: not for who only looks at configuration
    from fedtailor.strategy import Strategy

    def returns(function: Any) -> Any:
        try:
            return typing.get_type_hints(function).get("return")
        except Exception:  # an annotation that names nothing
            return None

    return {
        name: it
        for name, it in vars(module).items()
        if not name.startswith("_")
        and inspect.isfunction(it)
        and it.__module__ == module.__name__
        and returns(it) in (Strategy, Recipe)
    }
