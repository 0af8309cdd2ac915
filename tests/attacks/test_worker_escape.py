"""A training process that has turned against its site: what it can do outside of its cell, it cannot do in it.

Every attack is made twice by the same user, and must succeed where nothing confines it: a defence is shown only by what
it stops. The attacks are Python, run in the process; conftest.py gives them ``call``, ``check`` and the usual modules.
"""

import os
from pathlib import Path

import pytest

import fedtailor.client.worker
from fedtailor.errors import FedtailorError

READ = {  # what, the code that reads it, and what it finds
    "the site's key": ("open(key).read()", "what is in site/keys/site.key"),
    "the ledger": ("open(ledger).read()", "what is in site/state/ledger.db"),
    "the site's policy": ("open(site + '/site.yaml').read()", "what is in site/site.yaml"),
    "what has left the site": ("os.listdir(site + '/state/outbox')", "['a']"),
    "a file of somebody else": ("open(folder + '/other/diary').read()", "what is in other/diary"),
    "the machine's passwords": ("open('/etc/shadow').read()", "root:"),
    "the key through a link in its own folder": ("open(link).read()", "what is in site/keys/site.key"),
    "the key through its own root": ("open('/proc/self/root' + key).read()", "what is in site/keys/site.key"),
    "a process' arguments": ("open(f'/proc/{pid}/cmdline').read()", "site/keys/site.key"),
    "a process' environment": ("open(f'/proc/{pid}/environ').read()", "in the environment"),
    "a process' open file": ("open(f'/proc/{pid}/fd/{held}').read()", "what is in site/keys/site.key"),
    "a process' memory": ("os.pread(os.open(f'/proc/{pid}/mem', os.O_RDONLY), 9, address)", "in memory"),
    "a process' memory, by a system call": ("read_memory(pid, address)", "in memory"),
    "a process' open file, by a system call": ("os.pread(call(438, call(434, pid, 0), held, 0), 99, 0)", "what is in"),
}
DO = {
    "connect by TCP": "socket.create_connection(('127.0.0.1', port)).close()",
    "listen by TCP": "socket.create_server(('127.0.0.1', 0)).close()",
    "send by UDP": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', port))",
    "connect to a socket in a folder": "socket.socket(socket.AF_UNIX).connect(unix)",
    "connect to a socket without a folder": "socket.socket(socket.AF_UNIX).connect(abstract)",
    "ask the kernel for its network": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()",
    "make a pair of sockets": "socket.socketpair()",
    "trace a process": """
check(libc.ptrace(0x4206, pid, None, None) or libc.ptrace(0x4207, pid, None, None))  # PTRACE_SEIZE, _INTERRUPT
os.waitpid(pid, 0x40000000)
check(libc.ptrace(17, pid, None, None))""",
    "signal a process": "os.kill(pid, signal.SIGWINCH)",
    "signal a process by its handle": "signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGWINCH)",
    "run a shell": "subprocess.run(['/bin/sh', '-c', 'exit 0'], check=True)",
    "run a program": "os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)",
    "make a process": "child = os.fork()\nif not child: os._exit(0)\nos.waitpid(child, 0)",
    "write outside its folder": "open(folder + '/other/written', 'w').close()",
    "write an answer itself": "open(site + '/state/outbox/forged', 'w').close()",
    "write through a link in its own folder": "open(link, 'a').close()",
    "write to the data": "open(data, 'a').close()",
    "change the code that the daemon runs": "open(code, 'a').close()",
    "leave something in /tmp": "open(f'/tmp/fedtailor-{pid}', 'w').close()",
    "leave something in /dev/shm": "open(f'/dev/shm/fedtailor-{pid}', 'w').close()",
    "make a link for the daemon to follow": "os.symlink(key, scratch + '/made')",
    "make a second name for the key": "os.link(key, scratch + '/made')",
    "make a pipe for the daemon to wait at": "os.mkfifo(scratch + '/made')",
    "make a socket in a folder": "socket.socket(socket.AF_UNIX).bind(scratch + '/made')",
    "move the ledger away": "os.rename(ledger, scratch + '/made')",
    "delete the ledger": "os.unlink(ledger)",
    "empty the ledger": "os.truncate(ledger, 0)",
    "empty the data by opening them": "os.close(os.open(data, os.O_RDONLY | os.O_TRUNC))",
    "show the key to everybody": "os.chmod(key, 0o644)",
    "date the key": "os.utime(key)",
    "mark the key": "os.setxattr(key, 'user.seen', b'yes')",
    "watch the key": "check(libc.inotify_add_watch(libc.inotify_init1(0), key.encode(), 2))",
    "outlive the daemon": "check(libc.prctl(1, 0, 0, 0, 0))",
    "set its own limits": "resource.setrlimit(resource.RLIMIT_CORE, resource.getrlimit(resource.RLIMIT_CORE))",
    "set another's limits": "resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))",
    "hold memory in no process": "os.close(os.memfd_create('x'))",
    "share memory with others": "check(libc.shmctl(check(libc.shmget(0, 4096, 0o600)), 0, None))",
    "make a namespace": "check(libc.unshare(0x10020000))",
    "keep a secret in the kernel": "call(add_key, b'user', b'fedtailor', b'x', 1, -1)",
    "queue work in the kernel": "os.close(call(425, 1, ctypes.create_string_buffer(120)))",
    "keep a map in the kernel": "os.close(call(bpf, 0, (ctypes.c_uint32 * 32)(2, 4, 4, 1), 72))",
}
REFUSED = r"\[Errno \d+\]|not allowed to raise maximum limit"


@pytest.fixture(scope="module")
def outside(cell):
    return cell("open")


@pytest.fixture(scope="module")
def inside(cell):
    return cell("closed", "imports")


@pytest.fixture
def attack(site, victim):
    """Run an attack in a process, on a site that is as it was before the last one."""
    folder, x86 = site.folder, os.uname().machine == "x86_64"
    given = victim | {"folder": str(folder), "site": f"{folder}/site", "key": f"{folder}/site/keys/site.key",
                      "ledger": f"{folder}/site/state/ledger.db", "data": f"{folder}/data.csv",
                      "code": fedtailor.client.worker.__file__, "add_key": 248 if x86 else 217,
                      "bpf": 321 if x86 else 280}  # fmt: skip

    def run(it, code):
        link, made = it.scratch / "link", it.scratch / "made"
        if not link.is_symlink():
            link.symlink_to(given["key"])  # as if something else had left it there
        made.unlink(missing_ok=True)
        site.fill()
        return it.attack(code, **given, link=str(link), scratch=str(it.scratch))

    yield run
    for folder in ("/tmp", "/dev/shm"):
        Path(folder, f"fedtailor-{victim['pid']}").unlink(missing_ok=True)


def outside_it_works(attack, outside, what, code):
    try:
        return attack(outside, code)
    except FedtailorError as error:
        pytest.skip(f"{what}: this host does not let this user do so anyhow: {error}")


@pytest.mark.parametrize("what", READ)
def test_it_cannot_read(outside, inside, attack, what):
    code, found = READ[what]
    assert found in str(outside_it_works(attack, outside, what, f"got = str({code})"))
    with pytest.raises(FedtailorError, match=REFUSED) as error:
        attack(inside, f"got = str({code})")
    assert error.value.code == "crashed"


@pytest.mark.parametrize("what", DO)
def test_it_cannot(outside, inside, attack, what):
    outside_it_works(attack, outside, what, DO[what])
    with pytest.raises(FedtailorError, match=REFUSED) as error:
        attack(inside, DO[what])
    assert error.value.code == "crashed"


def test_what_the_cell_is_for_still_works(inside, attack):
    """Its data, its messages, its scratch folder, threads, and torch among them."""
    attack(inside, """
got = open(data).read()
assert got == "what is in data.csv"
os.makedirs(scratch + "/out/deep"); open(scratch + "/out/deep/file", "w").write("x")
os.replace(scratch + "/out/deep/file", scratch + "/out/deep/other"); os.unlink(scratch + "/out/deep/other")
os.rmdir(scratch + "/out/deep"); os.rmdir(scratch + "/out")
thread = threading.Thread(target=os.getpid); thread.start(); thread.join()
import tempfile, torch
tempfile.TemporaryFile().close()
torch.set_num_threads(2); torch.ones(400, 400) @ torch.ones(400, 400)
""")  # fmt: skip


def test_both_were_what_they_are_said_to_be(outside, inside):
    assert outside.confinement[:4] == ("none", 0, False, True)
    if inside.confinement.missing:
        pytest.skip(f"this host does not offer all of it: {inside.confinement.missing}")
    assert inside.confinement.network == "both" and inside.confinement.files and inside.confinement.processes


def test_every_thread_is_in_the_cell(inside):
    """Those of the libraries as well: they were started after it was closed."""
    inside.attack("import torch; torch.set_num_threads(2); torch.ones(400, 400) @ torch.ones(400, 400)")
    threads = [f"/proc/{inside.pid}/task/{name}/status" for name in os.listdir(f"/proc/{inside.pid}/task")]
    for path in threads:
        with open(path) as file:
            status = dict(line.split(":\t", 1) for line in file)
        assert status["Seccomp"].strip() == "2" and status["NoNewPrivs"].strip() == "1"
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
