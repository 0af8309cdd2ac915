"""What the coordinator's process keeps of memory, and hands back to the system: code, too, that only its start needed."""

import ctypes
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from fedtailor import heap

_RANGE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (r-[x-]p) \S+ \S+ \S+ +/")  # a file's pages, which nobody may write to
_MADV_DONTNEED = 4
KEPT = 12 * 1024 * 1024  # bytes that may lie free at a heap's end: the next chunk needs as much at once
LARGE = 32 * 1024 * 1024  # bytes from which a block is mapped, and unmapped when it is freed: glibc's most


def keep_heaps_few() -> None:
    """Have the copies of chunks in transit made where those before them lay.

    Chunks of megabytes pass through dozens of threads. By default glibc keeps what each of them frees in a heap of its own,
    and the process grows to many times the model; or, for blocks of this size, maps fresh pages for every copy, which takes
    the kernel longer than copying.
    """
    heap.keep(free=KEPT, large=LARGE, arenas=2)


def drop_code() -> None:
    """Let go of the pages of libraries that were read so far; what is still needed is read again when it is used.

    Two thirds of them ran once: torch registers its thousands of operators when it is imported, and never looks at that
    code again. The pages stay in the system's file cache as long as there is room, so that coming back costs no disk.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        with Path("/proc/self/smaps").open() as lines:
            for begin, end in list(unwritten(lines)):
                libc.madvise(begin, end - begin, _MADV_DONTNEED)
    except (OSError, AttributeError):
        pass  # another system: it will do as it does


def unwritten(smaps: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Where pages of files lie that are read-only and as they are in the file, by the text of /proc/PID/smaps.

    A library's tables of addresses are read-only as well, but filled in when it is loaded: they count as anonymous,
    and would be lost.
    """
    here: tuple[int, int] | None = None
    for line in smaps:
        if found := _RANGE.match(line):
            here = int(found[1], 16), int(found[2], 16)
        elif "-" in line.split(" ", 1)[0]:
            here = None
        elif here and line.startswith("Anonymous:"):
            if line.split()[1] == "0":
                yield here
            here = None
