"""The secret key of a site-level run's noise, and how far the models that it noised have left.

The key is drawn once and lies in the run's folder, the coordinator's alone, until the study is completed: a round that is
computed again after a crash has the noise that it had. Two different sums under the noise of one round could be subtracted
from each other, and the noise with them; so once the model of a round has left, that round is never computed again.
"""

import json
import secrets
from pathlib import Path
from typing import Any

from fedtailor import store
from fedtailor.errors import StoreError
from fedtailor.server.runs import Run
from fedtailor.study import Plan


def noise_key(run: Run, plan: Plan) -> bytes | None:
    """The run's key, drawn if it has none; None where the coordinator adds no noise.

    Raises:
        StoreError: if it is lost or damaged; the run cannot go on then.
    """
    if plan.site is None:
        return None
    if not _file(run).exists():
        known = run.load(plan.digest())
        if known is not None and known[1].round:
            raise StoreError(f"{_file(run)} is gone, and the noise of {known[1].round} rounds with it; start a new run")
        store.write_json(_file(run), {"key": secrets.token_hex(32), "released": 0})
    return bytes.fromhex(_read(run)["key"])


def releasing(run: Run, plan: Plan, round: int) -> None:
    """Note, before it leaves, that the model after ``round`` rounds leaves.

    Raises:
        StoreError: if that of a later one has left: an older checkpoint was put back.
    """
    if plan.site is None:
        return
    known = _read(run)
    if known["released"] > round:
        raise StoreError(
            f"{run.folder}: the checkpoint is that of round {round}, but the model of round {known['released']} has left; "
            "another sum under the same noise would give both away. Put the newest checkpoint back, or start a new run"
        )
    if known["released"] < round:
        store.write_json(_file(run), known | {"released": round})


def forget(run: Run) -> None:
    """Delete the key of a run that is completed: whoever had it could take the noise off its models."""
    _file(run).unlink(missing_ok=True)


def _file(run: Run) -> Path:
    return run.folder / "noise.json"


def _read(run: Run) -> dict[str, Any]:
    try:
        known = json.loads(_file(run).read_text())
        sound = len(bytes.fromhex(known["key"])) == 32 and isinstance(known["released"], int)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{_file(run)} cannot be read ({type(error).__name__}); start a new run") from error
    if not sound:
        raise StoreError(f"{_file(run)} is damaged; start a new run")
    return {"key": known["key"], "released": known["released"]}
