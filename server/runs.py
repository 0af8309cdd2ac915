"""A run's folder on the server: its plan, its status, its checkpoint."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from fedtailor import store
from fedtailor.errors import RefusedError, StoreError
from fedtailor.proposal import Proposal, Signed, parsed
from fedtailor.server.record import Progress
from fedtailor.study import Plan
from fedtailor.tree import Tree
from fedtailor.treefile import TreeFile, draft, opened

CHECKPOINT = "checkpoint.safetensors"
DONE = ("completed", "stopped", "failed")


class Status(NamedTuple):
    """What ``fedtailor server runs`` shows of a run."""

    run: str
    study: str
    status: str  # proposed, queued, running, completed, stopped, failed
    round: int  # rounds closed
    rounds: int
    detail: str = ""


class Run:
    """One run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name

    @classmethod
    def create(cls, studies: Path, plan: Plan, config_yaml: str, signed: Callable[[str], str]) -> "Run":
        """Queue a plan under a new name.

        Args:
            signed: makes the run's signed proposal, from its name.
        """
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        folder = studies / f"{plan.study}-{stamp}-{plan.digest()[:4]}"
        for suffix in range(1, 1000):
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:
                folder = folder.with_name(f"{plan.study}-{stamp}-{plan.digest()[:4]}-{suffix}")
        run = cls(folder)
        store.write_text(folder / "proposal.json", signed(run.name))
        store.write_text(folder / "plan.json", plan.canonical())
        store.write_text(folder / "config.yaml", config_yaml)
        run.write_status("proposed", 0)
        return run

    def plan(self) -> Plan:
        """The run's plan."""
        try:
            return Plan.parse((self.folder / "plan.json").read_text())
        except (OSError, ValueError, ValidationError) as error:
            raise StoreError(f"{self.folder / 'plan.json'} cannot be read: {error}") from error

    def proposal(self) -> tuple[str, Proposal]:
        """The run's proposal: as it travels, and opened."""
        path = self.folder / "proposal.json"
        try:
            text = path.read_text()
            return text, parsed(Signed.model_validate_json(text).proposal)
        except (OSError, ValueError, ValidationError, RefusedError) as error:
            raise StoreError(f"{path} cannot be read: {error}; submit the study anew") from error

    def status(self) -> Status:
        """What is known of the run."""
        try:
            plan = self.plan()
        except StoreError as error:
            return Status(self.name, "?", "failed", 0, 0, str(error))
        try:
            raw = json.loads((self.folder / "status.json").read_text())
            return Status(self.name, plan.study, raw["status"], raw["round"], plan.rounds, raw.get("detail", ""))
        except (OSError, ValueError, KeyError, TypeError):
            return Status(self.name, plan.study, "failed", 0, plan.rounds, "status.json cannot be read")

    def agree(self) -> None:
        """Note that the sites have agreed to the proposal: the run waits for its turn."""
        store.write_json(self.folder / "agreed.json", {})
        self.write_status("queued", 0, "the sites have agreed")

    def agreed(self) -> bool:
        """Whether they have."""
        return (self.folder / "agreed.json").exists()

    def note_contributors(self, sites: tuple[str, ...]) -> None:
        """Record whose answers are in the model that is about to be written."""
        store.write_json(self.folder / "contributors.json", list(sites))

    def contributors(self) -> list[str]:
        """The sites whose answers are in the model.

        Raises:
            StoreError: if that is not known.
        """
        path = self.folder / "contributors.json"
        try:
            return [str(site) for site in json.loads(path.read_text())]
        except (OSError, ValueError, TypeError) as error:
            raise StoreError(f"{path} cannot be read ({error}); events.jsonl names the sites of each round") from error

    def ended(self) -> bool:
        """Whether the run is over, for better or worse."""
        return self.status().status in DONE

    def write_status(self, status: str, round: int, detail: str = "") -> None:
        """Record the state of the run, atomically."""
        store.write_json(self.folder / "status.json", {"status": status, "round": round, "detail": detail})

    def begun(self) -> bool:
        """Whether there is a checkpoint."""
        return (self.folder / CHECKPOINT).exists()

    def save(self, state: Tree, progress: Progress, digest: str) -> None:
        """Write the checkpoint: one file, all or nothing."""
        store.save_tree(self.folder / CHECKPOINT, {"state": state}, _said(progress, digest))

    def step(self, write: Callable[[TreeFile, TreeFile], None], progress: Progress, digest: str) -> None:
        """Replace the checkpoint by one of the same layout, which ``write`` fills from it: all or nothing."""
        before, _ = self.checkpoint(digest)
        with store.replacing(self.folder / CHECKPOINT) as file:
            spec = {path: (span.dtype, span.shape) for path, span in before.spans.items()}
            after = draft(file, spec, _said(progress, digest))
            write(before, after)
            after.seal()

    def checkpoint(self, digest: str) -> tuple[TreeFile, Progress]:
        """The last checkpoint, on disk.

        Raises:
            StoreError: if it is damaged or belongs to another plan.
        """
        path = self.folder / CHECKPOINT
        saved = opened(path)
        return saved, _read(path, saved.metadata, digest)

    def load(self, digest: str) -> tuple[Tree, Progress] | None:
        """The last checkpoint in memory, or None where there is none yet.

        Raises:
            StoreError: if it is damaged or belongs to another plan.
        """
        if not self.begun():
            return None
        saved, progress = self.checkpoint(digest)
        state: Tree = saved.tree()["state"]
        return state, progress


def _said(progress: Progress, digest: str) -> dict[str, str]:
    return {"progress": json.dumps(progress._asdict()), "plan_sha256": digest}


def _read(path: Path, said: dict[str, str], digest: str) -> Progress:
    if said.get("plan_sha256") != digest:
        raise StoreError(f"{path} belongs to another plan than plan.json; restore the one that fits or start anew")
    try:
        return Progress(**json.loads(said["progress"]))
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} was written by another version of fedtailor ({error}); resume it there") from error
