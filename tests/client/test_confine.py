"""The training process' cell, piece by piece: the filter's decisions, what Python may still read, and what is said."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedtailor.client import landlock, seccomp, watch
from fedtailor.client.confine import Confinement
from fedtailor.client.watch import LimitPassed, Limits, Usage

# --- the filter of system calls, run by hand on both architectures ---

MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
PID = 4711


def decision(machine, number, *arguments, architecture=None):
    """What the kernel would do: the program's own verdict on one call."""
    data = {0: number, 4: MACHINES[machine][0] if architecture is None else architecture}
    for index in range(6):
        value = arguments[index] if index < len(arguments) else 0
        data |= {16 + 8 * index: value & 0xFFFFFFFF, 20 + 8 * index: value >> 32 & 0xFFFFFFFF}
    steps, at, held = seccomp.program(machine, PID), 0, 0
    while True:
        code, if_true, if_false, value = steps[at]
        at += 1
        if code == 0x20:  # load
            held = data[value]
        elif code == 0x54:  # and
            held &= value
        elif code == 0x06:  # return
            return value
        else:
            holds = {0x15: held == value, 0x25: held > value, 0x35: held >= value}[code]
            at += if_true if holds else if_false


ALLOWED, KILLED = 0x7FFF0000, 0x80000000
EPERM, ENOSYS = 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS


def call(machine, name):
    tables = f"{seccomp.REFUSED},{seccomp.ABSENT},{seccomp.LOOKED_INTO}"
    return seccomp.numbers(tables, MACHINES[machine][1])[name]


NEVER = """socket socketpair connect bind listen accept4 ptrace process_vm_readv process_vm_writev pidfd_open pidfd_getfd
    keyctl add_key request_key bpf perf_event_open mount umount2 move_mount open_tree fsopen fsmount pivot_root chroot
    unshare setns kexec_load kexec_file_load userfaultfd io_uring_setup execve execveat tkill pidfd_send_signal
    open_by_handle_at symlinkat linkat mknodat fchmodat fchmodat2 fchownat truncate setrlimit memfd_create shmget
    init_module reboot""".split()


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", NEVER)
def test_what_a_computation_never_needs_is_refused(machine, name):
    assert decision(machine, call(machine, name)) == EPERM


@pytest.mark.parametrize("name", ["fork", "vfork", "symlink", "link", "mknod", "chmod", "chown"])
def test_the_older_calls_are_refused_as_well(name):
    assert decision("x86_64", call("x86_64", name)) == EPERM


@pytest.mark.parametrize("machine", MACHINES)
def test_what_is_listed_is_refused_and_the_rest_is_not(machine):
    refused = seccomp.numbers(seccomp.REFUSED, MACHINES[machine][1])
    absent = seccomp.numbers(seccomp.ABSENT, MACHINES[machine][1])
    looked = seccomp.numbers(seccomp.LOOKED_INTO, MACHINES[machine][1])
    assert all(decision(machine, number) == EPERM for number in refused.values())
    assert all(decision(machine, number) == ENOSYS for number in absent.values())
    others = set(range(463)) - {*refused.values(), *absent.values(), *looked.values()}
    assert all(decision(machine, number) == ALLOWED for number in others)
    assert {decision(machine, number) for number in range(463, 600)} == {ENOSYS}, "calls of newer kernels"
    assert decision(machine, 0, architecture=0x40000003) == KILLED, "calls of a 32-bit program"
    other = next(name for name in MACHINES if name != machine)
    assert decision(machine, 0, architecture=MACHINES[other][0]) == KILLED


def test_the_other_numbering_of_x86_is_refused():
    assert {decision("x86_64", 0x40000000 | number) for number in (0, 1, 39, 59, 520)} == {EPERM}


THREAD = 0x3D0F00  # as the C library makes one
QUESTIONS = [  # call, arguments, whether it is allowed
    ("clone", (THREAD,), True),
    ("clone", (17,), False),  # fork: SIGCHLD
    ("clone", (0x4111,), False),  # vfork
    *((("clone", (THREAD | space,), False)) for space in (0x20000, 0x10000000, 0x20000000, 0x40000000)),
    ("kill", (PID, 9), True),
    ("kill", (PID + 1, 9), False),
    ("kill", (0, 9), False),
    ("kill", (-1 & 0xFFFFFFFF, 9), False),
    ("tgkill", (PID, PID + 3, 6), True),
    ("tgkill", (PID + 1, PID + 1, 6), False),
    ("rt_sigqueueinfo", (PID + 1,), False),
    ("rt_tgsigqueueinfo", (PID + 1,), False),
    ("prlimit64", (0, 7, 0, 0x7FFF12345678), True),
    ("prlimit64", (0, 7, 0x12345678, 0), False),
    ("prlimit64", (0, 7, 0x7FFF00000000, 0), False),  # the low half of the address is zero
    ("prctl", (15,), True),  # a thread's name
    *((("prctl", (option,), False)) for option in (1, 4, 0x59616D61)),
    ("ioctl", (1, 0x5401), True),  # is it a terminal
    *((("ioctl", (0, request), False)) for request in (0x5412, 0x541C)),
    ("openat", (3, 0, os.O_RDONLY | os.O_CLOEXEC), True),
    ("openat", (3, 0, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), True),
    ("openat", (3, 0, os.O_RDONLY | os.O_TRUNC), False),
]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name,arguments,allowed", QUESTIONS)
def test_what_depends_on_the_arguments(machine, name, arguments, allowed):
    assert decision(machine, call(machine, name), *arguments) == (ALLOWED if allowed else EPERM)


def test_the_older_way_to_open_is_looked_into_as_well():
    assert decision("x86_64", 2, 0, os.O_RDONLY | os.O_TRUNC) == EPERM and decision("x86_64", 2, 0, 0) == ALLOWED


@pytest.mark.parametrize("machine,path", [("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
                                          ("aarch64", "/usr/include/asm-generic/unistd.h")])  # fmt: skip
def test_the_numbers_are_the_kernels(machine, path):
    if not Path(path).exists():
        pytest.skip(f"{path} is not installed")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(path).read_text())
    kernel = {name: int(number) for name, number in found}
    tables = f"{seccomp.REFUSED},{seccomp.ABSENT},{seccomp.LOOKED_INTO}"
    ours = seccomp.numbers(tables, MACHINES[machine][1])
    named = {entry.split()[0] for entry in tables.split(",")}
    assert {n: v for n, v in ours.items() if n in kernel} == {n: v for n, v in kernel.items() if n in named}
    assert set(ours) - set(kernel) <= {"fchmodat2"}, "younger than some headers"


def test_a_machine_without_a_table_is_said():
    with pytest.raises(OSError, match="no table of system calls for riscv64"):
        seccomp.program("riscv64", PID)


# --- what is in force, in a small process of its own ---


def run(folder, code, *, before="", path=(), home=None, modules=""):
    """Confine a process whose site is ``home`` and run ``code`` in it; what it prints, as JSON."""
    home = home or folder / "site"
    (home / "keys").mkdir(parents=True, exist_ok=True)
    (home / "keys" / "site.key").write_text("the key")
    (home / "work").mkdir(exist_ok=True)
    program = f"""
import json, os, sys
from fedtailor.client import confine
{before}
made = confine.confine(confine.Rules({str(folder / "data.csv")!r}, (), {str(home / "work")!r},
                                     ({str(home)!r}, {str(home / "keys")!r}), 4096))
def can_read(path):
    try:
        open(path).close()
    except PermissionError:
        return False
    return True
key = {str(home / "keys" / "site.key")!r}
{code}
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, path), *(p for p in sys.path if p)])}
    given = [sys.executable, "-P", "-c", program]
    done = subprocess.run(given, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


REPORT = "print(json.dumps([made._asdict(), can_read(key)]))"
needs_landlock = pytest.mark.skipif(not landlock.abi(), reason="this kernel has no Landlock")


@needs_landlock
def test_it_is_what_the_kernel_says(tmp_path):
    code = """
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines())
spaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("net", "user", "ipc")]
import resource, socket
limits = [resource.getrlimit(getattr(resource, "RLIMIT_" + name)) for name in ("CORE", "DATA", "FSIZE", "NOFILE")]
print(json.dumps([made._asdict(), status, spaces, limits, os.getuid(), os.environ["HOME"], can_read(key)]))"""
    made, status, spaces, limits, uid, home, key_read = run(tmp_path, code)
    assert made["files"] == landlock.abi() and not key_read
    assert not made["new_privileges"] and status["NoNewPrivs"] == "1" and made["memory_mb"] == 4096
    assert made["processes"] == (status["Seccomp"] == "2")
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == int(status["CapInh"], 16) == 0
    own = [os.readlink(f"/proc/self/ns/{name}") for name in ("net", "user", "ipc")]
    assert all(theirs != ours for theirs, ours in zip(spaces, own, strict=True)) == (
        made["network"] in ("both", "namespace"))  # fmt: skip
    assert limits[0][1] <= 1 and limits[1] == limits[2] == [4096 * 2**20] * 2 and limits[3][1] <= 1024
    assert uid == os.getuid() and home == str(tmp_path / "site" / "work")


@needs_landlock
def test_a_site_within_a_folder_that_python_imports_from_is_closed_all_the_same(tmp_path):
    """A checkout, say, in which somebody has started a demo."""
    (tmp_path / "neighbour.py").write_text("")
    code = "import fedtailor.client.watch\n" + REPORT
    made, read = run(tmp_path, code, path=[tmp_path])
    assert made["files"] and not read
    other = tmp_path / "apart"
    other.mkdir()
    (other / "neighbour.py").write_text("")
    made, read = run(tmp_path, "import neighbour\n" + REPORT, path=[other])
    assert made["files"] and not read


@needs_landlock
def test_a_site_within_python_itself_is_not_said_to_be_confined(tmp_path):
    made, read = run(tmp_path, REPORT, before=f"sys.prefix = {str(tmp_path)!r}")
    assert read and made["files"] == 0
    assert re.search("files: .*/site can be read, because it lies in a folder that Python needs", made["missing"][0])


@needs_landlock
def test_packages_that_are_links_can_be_imported_and_what_lies_beside_them_cannot_be_read(tmp_path):
    real, links = tmp_path / "real", tmp_path / "links"
    (real / "linked").mkdir(parents=True)
    (real / "linked" / "__init__.py").write_text("")
    (real / "beside.txt").write_text("")
    links.mkdir()
    (links / "linked").symlink_to(real / "linked")
    code = f"import linked\nprint(json.dumps([linked.__file__, can_read({str(real / 'beside.txt')!r})]))"
    assert run(tmp_path, code, path=[links]) == [str(links / "linked" / "__init__.py"), False]


def test_what_a_host_does_not_offer_is_left_out_and_said(tmp_path):
    """None of it ends the process: whether that will do is the site's own decision."""
    before = """
def missing(*_): raise OSError(38, "Function not implemented")
for module, name in ((confine, "_enter_namespace"), (confine, "_drop_capabilities"), (confine, "_prctl"),
                     (confine.landlock, "restrict"), (confine.seccomp, "install"), (confine, "_limit")):
    setattr(module, name, missing)"""
    made, read = run(tmp_path, REPORT, before=before)
    assert Confinement(**made | {"missing": ()}) == Confinement() and read
    assert len(made["missing"]) == 6 and all("Function not implemented" in text for text in made["missing"])


def test_elsewhere_than_on_linux_it_is_said(tmp_path):
    made, read = run(tmp_path, REPORT, before="sys.platform = 'darwin'")
    assert read and (made["network"], made["files"], made["memory_mb"]) == ("none", 0, 4096)
    assert made["missing"] == ["all but limits: this is not Linux"]


def test_a_process_that_has_threads_already_is_not_said_to_be_confined(tmp_path):
    before = "import threading\nhold = threading.Event()\nthreading.Thread(target=hold.wait).start()"
    made, _ = run(tmp_path, f"{REPORT}\nhold.set()", before=before)
    assert made["files"] == 0 and any("there are 2 already" in text for text in made["missing"])


def test_the_worker_closes_its_cell_before_it_imports_anything_that_starts_threads():
    code = "import fedtailor.client.worker, sys, os; print(sorted({'torch', 'numpy', 'flwr', 'pydantic'} & set(sys.modules)), len(os.listdir('/proc/self/task')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] 1"


# --- the limits of a task ---


@pytest.mark.parametrize("seconds,used,code,says", [
    (11.0, Usage(0.0, 0), "time", "longer than 10 s (policy.task_seconds)"),
    (9.0, Usage(21.0, 0), "time", "longer than 20 s of processor time (policy.task_seconds times threads)"),
    (9.0, Usage(19.0, 101 * 2**20), "memory", "more memory than 100 MB (policy.task_memory_mb)"),
    (9.0, Usage(19.0, 99 * 2**20), None, None),
])  # fmt: skip
def test_a_limit_that_is_passed_is_named(seconds, used, code, says):
    limits = Limits(seconds=10.0, processor_seconds=20.0, memory_mb=100)
    if code is None:
        watch.check(limits, seconds, used)
        return
    with pytest.raises(LimitPassed, match=re.escape(says)) as error:
        watch.check(limits, seconds, used)
    assert error.value.code == code


def test_what_a_process_uses_is_read_from_the_kernel():
    begun = watch.usage(os.getpid())
    held = bytearray(64 * 2**20)
    while watch.usage(os.getpid()).processor_seconds <= begun.processor_seconds:
        pass
    assert watch.usage(os.getpid()).memory_bytes >= begun.memory_bytes + len(held) // 2
    assert watch.usage(2**22 + 1) == Usage(0.0, 0), "there is no such process"
