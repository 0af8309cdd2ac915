"""The training process confines itself, before it reads anything and before a second thread exists.

Layers, each by itself and none in need of root or of another program: a network namespace, a filter of system calls,
Landlock for files, limits on resources, no capabilities, no new privileges. What a host does not offer is left out, and
said. This module imports nothing heavy: a library that starts a thread would take it out of the cell.
"""

import ctypes
import errno
import os
import resource
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fedtailor
from fedtailor.client import landlock, seccomp

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000
CAPABILITY_VERSION = 0x20080522
FILES, THREADS = 1024, 256  # open at a time; threads beside four for each processor

# What Python, OpenMP and the C library look at, beside Python's own folders.
SYSTEM = (
    "/usr /lib /lib32 /lib64 /nix/store /etc/ld.so.cache /etc/ld.so.conf /etc/ld.so.conf.d /etc/localtime /etc/timezone "
    "/etc/passwd /etc/group /etc/nsswitch.conf /etc/os-release /etc/mime.types /etc/ssl/openssl.cnf /etc/pki/tls "
    "/etc/crypto-policies /dev/urandom /dev/random /dev/zero /proc/self /proc/cpuinfo /proc/meminfo /proc/stat "
    "/proc/filesystems /proc/sys/vm/overcommit_memory /proc/sys/kernel/cap_last_cap /sys/devices/system/cpu "
    "/sys/devices/system/node /sys/fs/cgroup /sys/kernel/mm/transparent_hugepage"
).split()


class Rules(NamedTuple):
    """What a training process may touch, as the daemon tells it. Paths are absolute."""

    data: str  # the one file of rows
    read: tuple[str, ...]  # folders: messages and memories
    scratch: str  # the one folder that it may write
    private: tuple[str, ...]  # folders that must be out of reach: the site's own, its keys
    memory_mb: int


class Confinement(NamedTuple):
    """What is in force. The defaults are a process that is not confined at all."""

    network: str = "none"  # "both", "namespace", "seccomp" or "none"
    files: int = 0  # Landlock's ABI; 0: files are not confined
    processes: bool = False  # whether starting programs and processes, and reaching others, is refused
    new_privileges: bool = True  # whether it could gain any
    memory_mb: int = 0  # of one task; 0: no limit
    task_seconds: int = 0  # of one task; 0: no limit
    missing: tuple[str, ...] = ()  # what this host does not offer, in plain words

    def rows(self) -> list[tuple[str, str]]:
        """In plain words, for people."""
        network = {"both": "none: own namespace, sockets refused", "namespace": "none: own namespace",
                   "seccomp": "none: sockets refused", "none": "NOT CONFINED"}  # fmt: skip
        files = f"only its data, its scratch folder and Python's own (Landlock ABI {self.files})"
        limits = f"{self.memory_mb} MB and {self.task_seconds} s a task" if self.memory_mb else "NONE"
        return [
            ("network", network[self.network]),
            ("files", files if self.files else "NOT CONFINED"),
            ("other processes", "none can be started or reached" if self.processes else "NOT CONFINED"),
            ("privileges", "none, and none to gain" if not self.new_privileges else "NOT CONFINED"),
            ("limits", limits),
            *(("missing here", text) for text in self.missing),
        ]


def die_with_parent(signal: int) -> None:
    """End when the thread that started this process does (Linux)."""
    if sys.platform == "linux":
        _prctl(PR_SET_PDEATHSIG, signal)


def confine(rules: Rules) -> Confinement:
    """Confine this process for good, as far as the host allows, and say how far that is. It never raises."""
    missing: list[str] = []

    def in_force(what: str, step: Callable[[], object]) -> bool:
        try:
            step()
        except (OSError, ValueError, AttributeError) as error:
            missing.append(f"{what}: {getattr(error, 'strerror', None) or error}")
            return False
        return True

    os.environ["HOME"] = rules.scratch  # where libraries keep what they cache
    bounded = in_force("limits", lambda: _limit(rules.memory_mb * 2**20))
    if sys.platform != "linux":
        return Confinement(memory_mb=rules.memory_mb * bounded, missing=("all but limits: this is not Linux", *missing))
    alone = in_force("a single thread", _alone)
    namespace = in_force("a network namespace of its own", _enter_namespace)
    in_force("no capabilities", _drop_capabilities)
    privileges = not in_force("no new privileges", lambda: _prctl(PR_SET_NO_NEW_PRIVS, 1))
    files = in_force("files", lambda: _restrict_files(rules)) and alone
    calls = in_force("a filter of system calls", seccomp.install)
    files = files and in_force("files", lambda: _out_of_reach(rules.private))
    sockets = calls and in_force("no sockets", _no_socket)
    network = ("both" if namespace else "seccomp") if sockets else ("namespace" if namespace else "none")
    return Confinement(
        network=network,
        files=landlock.abi() if files else 0,
        processes=calls,
        new_privileges=privileges,
        memory_mb=rules.memory_mb * bounded,
        missing=tuple(missing),
    )


def _alone() -> None:
    if (threads := len(os.listdir("/proc/self/task"))) > 1:
        raise OSError(errno.EBUSY, f"there are {threads} already, and Landlock binds one")


def _limit(memory: int) -> None:
    """Limits that the kernel holds. Time and resident memory are the daemon's to watch: they are for each task."""
    _lower(resource.RLIMIT_CORE, 1)  # with 0 a core is still piped to a program, if the host has one for it; not with 1
    _lower(resource.RLIMIT_NOFILE, FILES)
    _lower(resource.RLIMIT_FSIZE, memory)  # what it writes was in its memory
    _lower(resource.RLIMIT_DATA, memory)


def _lower(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def _enter_namespace() -> None:
    """A user namespace, in which this process may make itself a network without a single device."""
    uid, gid = os.geteuid(), os.getegid()
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    # Threads and processes are counted anew in there, so that the limit is this process' own.
    _lower(resource.RLIMIT_NPROC, THREADS + 4 * (os.cpu_count() or 1))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        try:
            Path("/proc/self", name).write_text(text)
        except OSError:  # it then reads "nobody" where its user's name would be, and owns its files all the same
            return


def _drop_capabilities() -> None:
    """Also those of root, where the daemon runs as root: it reads what its user may read, and no more."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _restrict_files(rules: Rules) -> None:
    closed = [Path(os.path.realpath(path)) for path in (*rules.private, rules.data)]
    read = [*map(Path, (*SYSTEM, rules.data, *rules.read)), *_python(closed)]
    landlock.restrict(read, [Path(rules.scratch), Path("/dev/null")])


def _python(closed: Iterable[Path]) -> Iterator[Path]:
    """Where Python reads its own files, their links followed: the kernel judges a file by where it really lies.

    A folder of PYTHONPATH that holds one of ``closed`` is left out; of a checkout, the package is enough.
    """
    package = Path(fedtailor.__file__).parent
    yield from map(Path, {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix})
    for folder in (package, *map(Path, sys.path), *map(Path, os.environ.get("LD_LIBRARY_PATH", "").split(":"))):
        if folder.is_absolute() and folder.exists():
            links = (child for child in folder.iterdir() if child.is_symlink()) if folder.is_dir() else ()
            for path in (folder, *links):
                real = Path(os.path.realpath(path))
                if not any(real == each or real in each.parents for each in closed):
                    yield real


def _out_of_reach(private: Iterable[str]) -> None:
    """Whether it is so: a site's folder that lies inside Python's, say, is readable in spite of the rules."""
    for path in private:
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            continue
        raise OSError(errno.EISDIR, f"{path} can be read, because it lies in a folder that Python needs; move it")


def _no_socket() -> None:
    try:
        socket.socket().close()
    except PermissionError:
        return
    raise OSError(errno.EISCONN, "one could be opened")


def _prctl(option: int, value: int) -> None:
    libc: Any = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
