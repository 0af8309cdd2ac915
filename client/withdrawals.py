"""What this site has withdrawn from: refused from that moment on, and told to the coordinator as soon as it can be."""

import logging
import threading
from pathlib import Path
from typing import Any, Literal

from fedtailor import pki, store, withdrawal
from fedtailor.client.connection import ask
from fedtailor.client.fleet import Fleet
from fedtailor.errors import FedtailorError, StoreError
from fedtailor.withdrawal import NOTICE, Notice

log = logging.getLogger("fedtailor.client")
AGAIN_S = 30.0  # between attempts to tell the coordinator


class Withdrawals:
    """The notices in ``folder``, a file each; one that was not told yet has no ``.told`` beside it."""

    def __init__(self, folder: Path, site: str, keys: Path) -> None:
        self.folder, self.site, self.keys = folder, site, keys
        self.untold = threading.Event()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._untold():
            self.untold.set()

    def covers(self, study: str) -> bool:
        """Whether this site has withdrawn from a study."""
        return not {None, study}.isdisjoint(withdrawal.standing(self._all()))

    def say(self, says: Literal["withdrawn", "back"], study: str | None) -> Notice:
        """Withdraw, or be back; in force when this returns, whether or not the coordinator can be told now."""
        number = len(self._paths())
        notice = withdrawal.noticed(pki.load_key(self.keys / "site.key"), self.site, number, study, says)
        store.write_text(self.folder / f"{number:06d}.json", notice.model_dump_json())
        self.untold.set()
        return notice

    def rows(self) -> list[dict[str, Any]]:
        """For people: every notice, and whether the coordinator has it."""
        return [
            one.model_dump(exclude={"signature"}) | {"told": path.with_suffix(".told").exists()}
            for path, one in zip(self._paths(), self._all(), strict=True)
        ]

    def tell(self, fleet: Fleet) -> None:
        """Post what the coordinator has not yet.

        Raises:
            FedtailorError: if it could not be told.
        """
        self.untold.clear()
        for path in self._untold():
            try:
                ask(fleet.context, fleet.server, NOTICE, path.read_text())
                path.with_suffix(".told").touch()
            except FedtailorError:
                self.untold.set()
                raise

    def keep_telling(self, fleet: Fleet, stop: threading.Event) -> None:
        """Until ``stop``; runs in a thread of its own."""
        while not stop.is_set():
            if not self.untold.wait(1.0):
                continue
            try:
                self.tell(fleet)
            except (FedtailorError, OSError) as error:
                log.warning("the coordinator could not be told of the withdrawal yet: %s", error)
                stop.wait(AGAIN_S)

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("*.json"))

    def _untold(self) -> list[Path]:
        return [path for path in self._paths() if not path.with_suffix(".told").exists()]

    def _all(self) -> list[Notice]:
        found = []
        for path in self._paths():
            try:
                found.append(Notice.model_validate_json(path.read_text()))
            except (OSError, ValueError) as error:
                raise StoreError(f"{path} cannot be read ({error}); restore it, or withdraw again") from error
        return found
