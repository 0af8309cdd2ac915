"""Messages in transit: Flower's own in-memory object store, with everything large in files.

What is in transit is lost with the process, and nothing is lost by it: the round is asked again, and sites answer from
their outboxes. In exchange updates never enter a database that would keep their bytes after they are deleted, and the
coordinator's memory does not grow with the number of replies.
"""

import shutil
from pathlib import Path

from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.object_store.object_store import NoObjectInStoreError

SMALL = 64 * 1024  # bytes; smaller objects stay in memory
SPILLED = b"\0spilled"


class SpillStore(InMemoryObjectStore):
    """An object store over ``folder``, which it empties when it starts."""

    def __init__(self, folder: Path) -> None:
        super().__init__(verify=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)
        self.folder = folder

    def put(self, object_id: str, object_content: bytes) -> None:
        """Store an object that was announced."""
        if len(object_content) <= SMALL:
            super().put(object_id, object_content)
            return
        if object_id not in self:
            raise NoObjectInStoreError(f"Object with ID '{object_id}' was not pre-registered.")
        if get_object_id(object_content) != object_id:
            raise ValueError(f"Object ID {object_id} does not match content hash")
        validate_object_content(content=object_content)
        (self.folder / object_id).write_bytes(object_content)
        with self.lock_store:
            entry = self.store.get(object_id)
            if entry is None:  # deleted meanwhile
                (self.folder / object_id).unlink(missing_ok=True)
            else:
                entry.content, entry.is_available = SPILLED, True

    def get(self, object_id: str) -> bytes | None:
        """An object's bytes, empty while it is on its way, None when it is unknown."""
        content = super().get(object_id)
        if content is not SPILLED:
            return content
        try:
            return (self.folder / object_id).read_bytes()
        except FileNotFoundError:
            return None

    def missing(self, ids: list[str]) -> list[str] | None:
        """The part of ``ids`` from the first that is still on its way, or None when one is unknown."""
        with self.lock_store:
            for i, object_id in enumerate(ids):
                if object_id not in self.store:
                    return None
                if not self.store[object_id].is_available:
                    return ids[i:]
        return []

    def delete(self, object_id: str) -> None:
        """Delete an object, its descendants that nothing else refers to, and their files."""
        with self.lock_store:
            known = object_id in self.store
            super().delete(object_id)  # calls this method for each child
            if known and object_id not in self.store:
                (self.folder / object_id).unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete everything."""
        super().clear()
        for path in self.folder.iterdir():
            path.unlink(missing_ok=True)
