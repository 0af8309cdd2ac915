"""Each layer of the training process' cell by itself: a host that lacks one still has the others."""

import pytest

from fedtailor.client import landlock
from fedtailor.errors import FedtailorError

ATTACKS = {
    "tcp": "socket.create_connection(('127.0.0.1', port)).close()",
    "abstract": "socket.socket(socket.AF_UNIX).connect(abstract)",
    "unix": "socket.socket(socket.AF_UNIX).connect(unix)",
    "key": "open(key).read()",
    "environ": "open(f'/proc/{pid}/environ').read()",
    "trace": "read_memory(pid, address)",
    "signal": "os.kill(pid, signal.SIGWINCH)",
    "shell": "subprocess.run(['/bin/sh', '-c', 'exit 0'], check=True)",
    "fork": "child = os.fork()\nif not child: os._exit(0)\nos.waitpid(child, 0)",
    "link": "os.symlink('/', scratch + '/made')",
    "pipe": "os.mkfifo(scratch + '/made')",
    "chmod": "os.chmod(key, 0o600)",
    "truncate": "os.truncate(key, 29)",
    "write": "open(folder + '/other/written', 'w').close()",
}
LAYERS = {  # the layer that is left, and what it stops alone
    "namespace": ("tcp", "abstract", "environ", "trace"),
    "files": ("key", "environ", "trace", "link", "pipe", "write", "truncate", "tcp", "abstract", "signal"),
    "calls": ("tcp", "abstract", "unix", "trace", "signal", "shell", "fork", "link", "pipe", "chmod", "truncate"),
}
SINCE = {"truncate": 3, "tcp": 4, "abstract": 6, "signal": 6}  # Landlock's ABI
REPORT = {  # network, whether files and processes are confined
    "namespace": ("namespace", False, False),
    "files": ("none", True, False),
    "calls": ("seccomp", False, True),
}


@pytest.fixture(scope="module")
def outside(cell):
    return cell("open")


@pytest.fixture(scope="module", params=LAYERS)
def alone(request, cell):
    """A process with one layer, and its name."""
    it = cell("closed", *(f"no-{layer}" for layer in LAYERS if layer != request.param))
    if len(it.confinement.missing) > 2:
        pytest.skip(f"this host does not offer it: {it.confinement.missing}")
    return it, request.param


@pytest.fixture
def attack(site, victim):
    def run(it, what):
        (it.scratch / "made").unlink(missing_ok=True)
        site.fill()
        return it.attack(ATTACKS[what], **victim, key=f"{site.folder}/site/keys/site.key", folder=str(site.folder),
                         scratch=str(it.scratch))  # fmt: skip

    return run


@pytest.mark.parametrize("alone,what", [(layer, what) for layer in LAYERS for what in LAYERS[layer]],
                         indirect=["alone"])  # fmt: skip
def test_a_layer_alone_stops_what_it_is_for(attack, outside, alone, what):
    it, layer = alone
    if layer == "files" and landlock.abi() < SINCE.get(what, 1):
        pytest.skip(f"Landlock stops it since ABI {SINCE[what]}; this kernel has {landlock.abi()}")
    try:
        attack(outside, what)
    except FedtailorError as error:
        pytest.skip(f"this host does not let this user do so anyhow: {error}")
    with pytest.raises(FedtailorError, match=r"\[Errno \d+\]"):
        attack(it, what)


def test_what_is_missing_is_said(alone):
    it, layer = alone
    network, files, processes = REPORT[layer]
    found = it.confinement
    assert (found.network, bool(found.files), found.processes) == (network, files, processes)
    assert not found.new_privileges and found.memory_mb and found.task_seconds
    assert len(found.missing) == 2 and all("left out by the test" in text for text in found.missing)
    said = dict(found.rows())
    assert ("NOT CONFINED" in said["network"]) == (network == "none")
    assert ("NOT CONFINED" in said["files"]) != files and ("NOT CONFINED" in said["other processes"]) != processes


@pytest.mark.parametrize("left_out", [("open",), ("no-files",), ("no-calls", "no-namespace")])
def test_a_site_may_refuse_to_train_without(cell, left_out):
    with pytest.raises(FedtailorError, match="confinement: required, but on this host") as error:
        cell(*left_out, confinement="required")
    assert error.value.code == "confinement"


def test_a_site_that_requires_it_trains_with_it(cell):
    it = cell("closed")
    if it.confinement.missing:
        pytest.skip(f"this host does not offer all of it: {it.confinement.missing}")
    assert cell("closed", confinement="required").attack("got = 1") == 1
