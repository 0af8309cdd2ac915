"""A training process that has turned against its site, in a cell and out of it, as the same user."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

import fedtailor
from fedtailor.client import workshop
from fedtailor.client.site import SiteConfig
from fedtailor.client.workshop import Workshop

NOBODY = 65534
PACKAGES = os.pathsep.join([str(Path(fedtailor.__file__).parents[1]), *(p for p in sys.path if "-packages" in p)])
# The worker's own start, after which it runs what it is sent: "open", "closed", or with a layer left out ("no-files").
# With "imports", it has imported and begun all that the real one has.
TURNED = """
import ctypes, os, resource, signal, socket, subprocess, sys, threading, time
from fedtailor.client import worker
from fedtailor.client.confine import Confinement, confine
from fedtailor.errors import FedtailorError

libc = ctypes.CDLL(None, use_errno=True)

def call(*arguments):
    result = libc.syscall(*(ctypes.c_long(it) if isinstance(it, int) else it for it in arguments))
    return check(result)

def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def read_memory(pid, address):
    class Piece(ctypes.Structure):
        _fields_ = [("begin", ctypes.c_void_p), ("length", ctypes.c_size_t)]
    room = ctypes.create_string_buffer(9)
    mine, theirs = Piece(ctypes.addressof(room), 9), Piece(address, 9)
    check(libc.process_vm_readv(pid, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0))
    return room.raw.decode()

class Turned:
    def __init__(self):
        self.operations = {"attack": self.attack}
    def attack(self, request):
        names = globals() | request["given"]
        exec(request["code"], names)
        return {"got": names.get("got")}

def tasks(request, real=worker._tasks):
    if "imports" in sys.argv:
        real(request)
    return Turned()

worker._tasks = tasks
def left_out(*_):
    raise OSError(0, "left out by the test")

from fedtailor.client import confine as cell
if "open" in sys.argv:
    worker.confine = lambda rules: Confinement()
if "no-namespace" in sys.argv:
    cell._enter_namespace = left_out
if "no-files" in sys.argv:
    cell.landlock.restrict = left_out
if "no-calls" in sys.argv:
    cell.seccomp.install = left_out
worker.main()
"""
# Whom it attacks: a process of the same user that holds the key, as the daemon does.
VICTIM = """
import ctypes, json, os, socket, sys
key = sys.argv[1]
held = open(key)
secret = ctypes.create_string_buffer(b"in memory")
listeners = [socket.socket(), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
abstract = "\\0fedtailor-%d" % os.getpid()
for listener, address in zip(listeners, [("127.0.0.1", 0), abstract, key + ".sock"]):
    listener.bind(address)
    listener.listen(64)
print(json.dumps({"pid": os.getpid(), "port": listeners[0].getsockname()[1], "abstract": abstract,
                  "unix": key + ".sock", "held": held.fileno(), "address": ctypes.addressof(secret)}), flush=True)
sys.stdin.read()
"""


class Site(NamedTuple):
    """A site's folder, and what is around it."""

    folder: Path
    user: int | None  # who runs the process, where it is somebody else than the tests' own user
    python: str

    def fill(self) -> None:
        """Make it what it was."""
        for name in ("site/keys", "site/state/outbox", "other"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for name in ("site/keys/site.key", "site/state/ledger.db", "site/site.yaml", "other/diary", "site/state/outbox/a",
                     "data.csv"):  # fmt: skip
            (self.folder / name).write_text(f"what is in {name}")
            (self.folder / name).chmod(0o600)
        for path in (self.folder, *self.folder.rglob("*")):
            if self.user is not None and not path.is_symlink():
                os.chown(path, self.user, self.user)

    def config(self, confinement: str = "best", **policy: Any) -> SiteConfig:
        return SiteConfig.model_validate({
            "site": "va",
            "server": "hub.example:8443",
            "keys": str(self.folder / "site" / "keys"),
            "data": {"name": "heart", "path": str(self.folder / "data.csv")},
            "policy": {"studies": ["heart"], "epsilon": 8.0, "delta": 1e-4, **policy},
            "confinement": confinement,
        })  # fmt: skip

    def options(self) -> dict[str, Any]:
        return {} if self.user is None else {"user": self.user, "group": self.user, "extra_groups": []}


def _usable_by(user: int) -> str | None:
    """A Python that ``user`` can run, and with which it can read this package."""
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        environment = {"PYTHONPATH": PACKAGES}
        given = [python, "-P", "-c", "import fedtailor.client.worker, flwr, safetensors"]
        try:
            options = {"user": user, "group": user, "extra_groups": [], "capture_output": True, "check": False}
            if subprocess.run(given, env=environment, cwd="/", **options).returncode == 0:
                return python
        except OSError:
            pass
    return None


@pytest.fixture(
    scope="module",
    params=["own user", pytest.param("nobody", marks=pytest.mark.slow)] if os.geteuid() == 0 else ["own user"],
)
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    user, python = None, sys.executable
    if request.param == "nobody":
        user, found = NOBODY, _usable_by(NOBODY)
        if found is None:
            pytest.skip("another user can read no Python here, or not this package")
        python = found
    folder = Path(tempfile.mkdtemp(prefix="fedtailor-attacks-"))
    made = Site(folder, user, python)
    made.fill()
    yield made
    shutil.rmtree(folder)


class Turned(Workshop):
    """A workshop whose process runs what it is sent. ``how``: see there."""

    how: tuple[str, ...]
    python: str

    def _command(self) -> list[str]:
        return [self.python, "-P", "-c", TURNED, *self.how]

    def attack(self, code: str, /, **given: Any) -> Any:
        return self.ask(op="attack", code=code, given=given)["got"]


Cell = Callable[..., Turned]


@pytest.fixture(scope="module")
def cell(site: Site) -> Iterator[Cell]:
    """Start a process that has turned, with what ``TURNED`` says and rules of the site's policy."""
    made: list[Turned] = []

    def as_the_user(*arguments: Any, env: dict[str, str], **others: Any) -> "subprocess.Popen[bytes]":
        if site.user is not None:
            env = env | {"PYTHONPATH": PACKAGES}
            for path in (Path(env["TMPDIR"]), Path(env["TMPDIR"]).parent):
                os.chown(path, site.user, site.user)
        return subprocess.Popen(*arguments, env=env, **site.options(), **others)

    def start(*how: str, confinement: str = "best", **policy: Any) -> Turned:
        state = site.folder / "site" / f"state-{len(made)}"
        state.mkdir(mode=0o755)
        it = Turned(site.config(confinement, **policy), state / "worker.log")
        it.how, it.python = how, site.python
        made.append(it)
        it.start()
        return it

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workshop, "subprocess", SimpleNamespace(Popen=as_the_user, PIPE=subprocess.PIPE))
        yield start
    for it in made:
        it.stop()


@pytest.fixture(scope="module")
def victim(site: Site) -> Iterator[dict[str, Any]]:
    key = site.folder / "site" / "keys" / "site.key"
    given = [site.python, "-c", VICTIM, str(key)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(given, **pipes, env={"SECRET": "in the environment"}, **site.options()) as process:
        yield json.loads(process.stdout.readline())
        process.stdin.close()
