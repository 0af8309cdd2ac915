"""A filter of system calls (seccomp-BPF) for a process that computes and needs nothing else of the kernel.

What is listed is refused with EPERM, so that a library which merely tries goes on; a call of a foreign architecture
ends the process. Calls newer than this table do not exist for it. Numbers: arch/x86/entry/syscalls/syscall_64.tbl and
include/uapi/asm-generic/unistd.h of Linux.
"""

import ctypes
import errno
import os
from typing import NamedTuple

NEWEST = 462  # mseal; what came after it is answered with ENOSYS

# name, number on x86_64, number on aarch64 (- where it has no such call)
REFUSED = """
    socket 41 198, socketpair 53 199, connect 42 203, bind 49 200, listen 50 201, accept 43 202, accept4 288 242,
    sendmsg 46 211, sendmmsg 307 269,

    ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, process_madvise 440 440, kcmp 312 272,
    pidfd_open 434 434, pidfd_getfd 438 438, pidfd_send_signal 424 424, tkill 200 130,
    execve 59 221, execveat 322 281, fork 57 -, vfork 58 -,

    add_key 248 217, request_key 249 218, keyctl 250 219,

    bpf 321 280, perf_event_open 298 241, userfaultfd 323 282, io_uring_setup 425 425, io_uring_enter 426 426,
    io_uring_register 427 427, kexec_load 246 104, kexec_file_load 320 294, init_module 175 105, finit_module 313 273,
    delete_module 176 106, personality 135 92, modify_ldt 154 -, iopl 172 -, ioperm 173 -, syslog 103 116, acct 163 89,
    quotactl 179 60, quotactl_fd 443 443, swapon 167 224, swapoff 168 225, reboot 169 142, settimeofday 164 170,
    clock_settime 227 112, adjtimex 159 171, clock_adjtime 305 266, sethostname 170 161, setdomainname 171 162,
    vhangup 153 58, lookup_dcookie 212 18, setrlimit 160 164,

    mount 165 40, umount2 166 39, move_mount 429 429, open_tree 428 428, fsopen 430 430, fsconfig 431 431,
    fsmount 432 432, fspick 433 433, mount_setattr 442 442, pivot_root 155 41, chroot 161 51, unshare 272 97,
    setns 308 268, name_to_handle_at 303 264, open_by_handle_at 304 265, fanotify_init 300 262, fanotify_mark 301 263,
    inotify_init 253 -, inotify_init1 294 26,

    symlink 88 -, symlinkat 266 36, link 86 -, linkat 265 37, mknod 133 -, mknodat 259 33, truncate 76 45,
    chmod 90 -, fchmodat 268 53, fchmodat2 452 452, chown 92 -, lchown 94 -, fchown 93 55, fchownat 260 54,
    setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16,
    utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88,

    shmget 29 194, msgget 68 186, semget 64 190, mq_open 240 180, memfd_create 319 279, memfd_secret 447 447
"""
# Their arguments lie in memory, which a filter cannot read: with ENOSYS, libraries fall back on the call that it can.
ABSENT = "clone3 435 435, openat2 437 437"
# These depend on an argument; see _conditions.
LOOKED_INTO = """
    clone 56 220, kill 62 129, tgkill 234 131, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, prlimit64 302 261,
    prctl 157 167, ioctl 16 29, open 2 -, openat 257 56
"""

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH_…, column of the tables
X32 = 0x40000000

LOAD, EQUAL, AT_LEAST, GREATER, AND, RETURN = 0x20, 0x15, 0x35, 0x25, 0x54, 0x06
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; arguments have 8 bytes, low half first

CLONE_THREAD = 0x00010000
NEW_NAMESPACES = 0x7E020080
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_PTRACER = 1, 4, 0x59616D61
TIOCSTI, TIOCLINUX = 0x5412, 0x541C
SET_MODE_FILTER = 1
ALL_THREADS, AS_FAST = 1, 4  # older kernels slow a filtered process down, against others that read along in it
SECCOMP = (317, 277)


class Instruction(NamedTuple):
    """One step of a classic BPF program."""

    code: int
    if_true: int
    if_false: int
    value: int


def numbers(table: str, column: int) -> dict[str, int]:
    """The calls of a table above that exist on an architecture, by name."""
    rows = [entry.split() for entry in table.split(",")]
    return {row[0]: int(row[1 + column]) for row in rows if row[1 + column] != "-"}


def program(machine: str, pid: int) -> list[Instruction]:
    """The filter for a process ``pid`` on ``machine``.

    Raises:
        OSError: where there is no table of system calls for the machine.
    """
    if machine not in ARCHITECTURES or ctypes.sizeof(ctypes.c_void_p) != 8:
        raise OSError(errno.ENOSYS, f"there is no table of system calls for {machine}")
    architecture, column = ARCHITECTURES[machine]
    made = [
        Instruction(LOAD, 0, 0, ARCHITECTURE),
        Instruction(EQUAL, 1, 0, architecture),
        Instruction(RETURN, 0, 0, KILL),
        Instruction(LOAD, 0, 0, NUMBER),
    ]
    if machine == "x86_64":
        made += [Instruction(AT_LEAST, 0, 1, X32), _refuse()]
    made += [Instruction(GREATER, 0, 1, NEWEST), _refuse(errno.ENOSYS)]
    for number in numbers(REFUSED, column).values():
        made += [Instruction(EQUAL, 0, 1, number), _refuse()]
    for number in numbers(ABSENT, column).values():
        made += [Instruction(EQUAL, 0, 1, number), _refuse(errno.ENOSYS)]
    for name, number in numbers(LOOKED_INTO, column).items():
        steps = _conditions(name, pid)
        made += [Instruction(EQUAL, 0, len(steps), number), *steps]
    return [*made, Instruction(RETURN, 0, 0, ALLOW)]


def _conditions(name: str, pid: int) -> list[Instruction]:
    """What is asked of the arguments of ``name``; the answer is always given in here."""
    allow, refuse = Instruction(RETURN, 0, 0, ALLOW), _refuse()
    if name == "clone":  # a thread, not a process, and no namespaces
        ask = [Instruction(AND, 0, 0, CLONE_THREAD | NEW_NAMESPACES), Instruction(EQUAL, 0, 1, CLONE_THREAD)]
        return [_argument(0), *ask, allow, refuse]
    if name in ("kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"):  # to itself
        return [_argument(0), Instruction(EQUAL, 0, 1, pid), allow, refuse]
    if name == "prlimit64":  # to ask, not to set
        nothing = Instruction(EQUAL, 0, 3, 0)
        return [_argument(2), nothing, _argument(2, high=True), nothing._replace(if_false=1), allow, refuse]
    if name == "prctl":  # not to outlive the daemon, nor to let itself be dumped or traced
        return [_argument(0), *_any_of(PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_PTRACER)]
    if name == "ioctl":  # not to type into a terminal
        return [_argument(1), *_any_of(TIOCSTI, TIOCLINUX)]
    # An open for reading that empties the file: before its ABI 3, Landlock takes it for one that reads only.
    flags = [Instruction(AND, 0, 0, os.O_TRUNC | os.O_ACCMODE), *_any_of(os.O_TRUNC)]
    return [_argument(1 if name == "open" else 2), *flags]


def _any_of(*values: int) -> list[Instruction]:
    steps = [Instruction(EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
    return [*steps, Instruction(RETURN, 0, 0, ALLOW), _refuse()]


def _argument(index: int, *, high: bool = False) -> Instruction:
    return Instruction(LOAD, 0, 0, ARGUMENTS + 8 * index + (4 if high else 0))


def _refuse(number: int = errno.EPERM) -> Instruction:
    return Instruction(RETURN, 0, 0, ERRNO | number)


class _Step(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("t", ctypes.c_uint8), ("f", ctypes.c_uint8), ("k", ctypes.c_uint32)]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("steps", ctypes.POINTER(_Step))]


def install() -> None:
    """Put the filter in force for this process, all of its threads and for good. It has no new privileges already.

    Raises:
        OSError: where the kernel or the machine has no such thing.
    """
    machine = os.uname().machine
    steps = program(machine, os.getpid())
    given = _Program(len(steps), (_Step * len(steps))(*(_Step(*step) for step in steps)))
    libc = ctypes.CDLL(None, use_errno=True)
    number = SECCOMP[ARCHITECTURES[machine][1]]
    if libc.syscall(ctypes.c_long(number), SET_MODE_FILTER, ALL_THREADS | AS_FAST, ctypes.byref(given)):
        raise OSError(ctypes.get_errno() or errno.EBUSY, "seccomp")
