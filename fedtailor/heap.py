"""What the C library does with memory that was freed, where it is glibc. With another these do nothing.

A block larger than some threshold is mapped when it is asked for and unmapped when it is freed. Who asks for such blocks
again and again waits for the kernel to map, and to clear, the same pages each time: that can take longer than their use.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def keep(free: int, large: int, arenas: int | None = None) -> None:
    """Keep freed memory for whoever asks next.

    Args:
        free: bytes that may lie free at a heap's end before they are returned to the system.
        large: bytes from which a block is mapped all the same.
        arenas: heaps at most, whatever the number of threads; None: glibc's own rule.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, large)
        libc.mallopt(_M_TRIM_THRESHOLD, free)
        if arenas is not None:
            libc.mallopt(_M_ARENA_MAX, arenas)
    except (OSError, AttributeError):
        pass


def trim() -> None:
    """Return the free pages of all heaps to the system, wherever they lie in them."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass
