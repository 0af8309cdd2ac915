"""Where a simulated study stands between two rounds, and its checkpoint: taken up again, it ends bit for bit the same."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtailor import store
from fedtailor.errors import ConfigError, StoreError
from fedtailor.simulations.buffered import Answer, Clock
from fedtailor.tree import Tree


@dataclass
class Standing:
    """What changes from round to round. ``block`` does where memory asks for smaller ones."""

    round: int  # the next one
    state: Tree
    memory: Tree  # leaves [V, ...]: of the clients in ``known``
    known: list[int]  # that were asked before, or all there are
    clock: Clock
    block: int
    stale: list[dict[str, Any]] = field(default_factory=list)  # answers that were too old to count
    history: list[dict[str, Any]] = field(default_factory=list)
    round_s: list[float] = field(default_factory=list)
    virtual_s: list[float] = field(default_factory=list)
    trained: int = 0  # clients of the last round


NUMBERS = ("round", "known", "block", "stale", "history", "round_s", "virtual_s")  # what a checkpoint's header holds


def save(path: Path, at: Standing, also: Mapping[str, Any], digest: str) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        also: what else has to be known again, as JSON has it.
        digest: of the study; see :func:`digest_of`.

    Raises:
        StoreError: if it cannot be written; the one before it is then still there.
    """
    coming = {str(n): one.summand for n, one in enumerate(at.clock.coming)}
    due = [[one.due, one.client, one.round, one.lost] for one in at.clock.coming]
    said = {name: getattr(at, name) for name in NUMBERS} | {"now": at.clock.now, "coming": due, "also": dict(also)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{path.parent} cannot be made: {error.strerror}; choose another folder") from error
    trees: Tree = {"state": at.state, "memory": at.memory, "coming": coming}
    store.save_tree(path, trees, {"standing": json.dumps(said), "study": digest})


def load(path: Path, digest: str) -> tuple[Standing, dict[str, Any]]:
    """The standing that a checkpoint holds, and what was saved beside it.

    Raises:
        StoreError: if it is damaged or of another version.
        ConfigError: if it is of another study, or of other settings.
    """
    trees, header = store.load_tree(path)
    if header.get("study") != digest:
        raise ConfigError(
            f"{path} is of a study with other settings or other data; give those it was begun with, or begin anew in "
            "another folder"
        )
    try:
        said = json.loads(header["standing"])
        coming = trees.get("coming", {})
        answers = tuple(
            Answer(due, client, round, {} if lost else coming[str(n)], lost)
            for n, (due, client, round, lost) in enumerate(said["coming"])
        )
        numbers = {name: said[name] for name in NUMBERS}
        at = Standing(
            state=trees["state"], memory=trees.get("memory", {}), clock=Clock(said["now"], answers), **numbers
        )
        return at, said["also"]
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path} was written by another version of fedtailor ({error}); go on with it there"
        ) from error


def digest_of(*parts: object) -> str:
    """What a checkpoint belongs to: the plan, the data's fingerprints, and the settings that change a result."""
    return hashlib.sha256("\n".join(str(part) for part in parts).encode()).hexdigest()
