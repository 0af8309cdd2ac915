"""What happened, one JSON document a line: for people who watch, and for those who must explain a run later."""

import json
import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Sink = Callable[[dict[str, Any]], None]


class Events:
    """Appends events to a file and tells every sink.

    Nothing here stops a training: a full disk, or a sink that raises, is told once to stderr. The file is whole lines
    at all times: half a line, left by a full disk or ``kill -9``, is cut off before the next is written.

    Args:
        path: of the file; None for sinks only.
        sinks: are told each event, a dict with ``time`` (UTC, ISO 8601), ``kind`` and its fields.
    """

    def __init__(self, path: Path | None, sinks: Sequence[Sink] = ()) -> None:
        self.path, self.sinks = path, tuple(sinks)
        self._said: set[str] = set()
        self._whole = False  # whether the file is known to end with a whole line
        self._lock = threading.Lock()

    def emit(self, kind: str, **fields: Any) -> None:
        """Record that ``kind`` happened. A number that is not finite becomes None: JSON has no word for it."""
        event = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "kind": kind, **_plain(fields)}
        if self.path is not None:
            try:
                with self._lock:
                    self._append(self.path, (json.dumps(event) + "\n").encode())
            except OSError as error:
                self._say("file", f"{self.path} cannot be written ({error.strerror}); going on without")
        for sink in self.sinks:
            try:
                sink(event)
            except Exception as error:  # whoever watches must not be able to stop what is watched
                self._say(f"sink {id(sink)}", f"a watcher failed ({type(error).__name__}: {error}); going on")

    def _append(self, path: Path, line: bytes) -> None:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            if not self._whole:
                _cut_torn_line(handle)
            self._whole = False
            written = os.write(handle, line)  # one call, so that a reader sees the line whole
            self._whole = written == len(line)
            if not self._whole:
                raise OSError(0, "the disk is full")
        finally:
            os.close(handle)

    def _say(self, key: str, text: str) -> None:
        if key not in self._said:
            self._said.add(key)
            print(f"events: {text}", file=sys.stderr)


def _cut_torn_line(handle: int) -> None:
    """Cut the file back to the end of its last whole line."""
    end = os.fstat(handle).st_size
    begin, kept = end, 0
    while begin and not kept:
        begin = max(0, begin - 4096)
        kept = os.pread(handle, min(4096, end - begin), begin).rfind(b"\n") + 1
    if begin + kept != end:
        os.ftruncate(handle, begin + kept)


def _plain(value: Any) -> Any:
    """``value`` as JSON can write it."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)
