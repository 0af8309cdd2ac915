"""Landlock: which files this process may open from now on, held by the kernel (Linux 5.13 and later, no privileges).

https://docs.kernel.org/userspace-api/landlock.html; the numbers are of include/uapi/linux/landlock.h.
"""

import ctypes
import os
import stat
from collections.abc import Iterable
from pathlib import Path

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture
VERSION, PATH_BENEATH = 1, 1
WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG = (1 << n for n in (1, 2, 3, 4, 5, 7, 8))
TRUNCATE, IOCTL_DEV = 1 << 14, 1 << 15
READ = READ_FILE | READ_DIR
WRITE = READ | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | TRUNCATE  # no links, pipes or sockets
OF_A_FILE = WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
TCP = 0b11  # to bind and to connect
SCOPED = 0b11  # abstract Unix sockets and signals: only to processes under the same rules


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("rights", ctypes.c_uint64), ("folder", ctypes.c_int32)]


def abi() -> int:
    """The version of Landlock that this kernel has; 0 if none."""
    found = ctypes.CDLL(None).syscall(ctypes.c_long(CREATE_RULESET), None, ctypes.c_size_t(0), VERSION)
    return max(0, int(found))


def restrict(read: Iterable[Path], write: Iterable[Path]) -> int:
    """Let this thread, and those it starts, open nothing but what is named. It has no new privileges already.

    Args:
        read: files, and folders with all that is beneath them; what does not exist is passed over.
        write: the same; there also files and folders may be made and removed. A device is written, and no more.

    Returns:
        Landlock's ABI.

    Raises:
        OSError: where the kernel has no Landlock, or refuses.
    """
    version = abi()
    if not version:
        raise OSError(0, "this kernel has no Landlock, or it is switched off")
    # ABI 1 has 13 rights; 2, 3 and 5 brought one more each, 4 the network, 6 the scopes.
    handled = (1 << 13 + sum(version >= since for since in (2, 3, 5))) - 1
    ruleset = _Ruleset(handled, TCP if version >= 4 else 0, SCOPED if version >= 6 else 0)
    handle = _call(CREATE_RULESET, ctypes.byref(ruleset), ctypes.c_size_t(ctypes.sizeof(ruleset)), 0)
    try:
        for paths, rights in ((read, READ), (write, WRITE)):
            for path in paths:
                _allow(handle, path, rights & handled)
        _call(RESTRICT_SELF, handle, 0)
    finally:
        os.close(handle)
    return version


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # what cannot be named needs no rule
        return
    try:
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            rights &= OF_A_FILE
        _call(ADD_RULE, ruleset, PATH_BENEATH, ctypes.byref(_Beneath(rights, handle)), 0)
    finally:
        os.close(handle)


def _call(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"Landlock: {os.strerror(ctypes.get_errno())}")
    return result
