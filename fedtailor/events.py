"""What happened, one JSON document a line: for people who watch, and for those who must explain a run later."""

import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Sink = Callable[[dict[str, Any]], None]


class Events:
    """Appends events to a file and tells every sink. A full disk never stops a training: it is said once, to stderr."""

    def __init__(self, path: Path | None, sinks: Sequence[Sink] = ()) -> None:
        self.path, self.sinks, self._said = path, tuple(sinks), False

    def emit(self, kind: str, **fields: Any) -> None:
        """Record that ``kind`` happened."""
        event = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "kind": kind, **fields}
        if self.path is not None:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(event) + "\n")
            except OSError as error:
                if not self._said:
                    self._said = True
                    print(
                        f"events: {self.path} cannot be written ({error.strerror}); going on without", file=sys.stderr
                    )
        for sink in self.sinks:
            sink(event)
