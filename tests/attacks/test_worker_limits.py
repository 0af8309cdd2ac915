"""A training process that takes more than its site allows: it is refused or ended, said to be, and replaced."""

import os
import resource
from pathlib import Path

import pytest

from fedtailor.client.watch import LimitPassed
from fedtailor.client.workshop import WorkerDied
from fedtailor.errors import FedtailorError

ENOUGH = {"task_seconds": 600, "task_memory_mb": 8192}
ALLOCATE = "held = bytearray(400 * 2**20); got = len(held)"
SHARE = """
import mmap
held = mmap.mmap(-1, 400 * 2**20)  # shared, which the kernel's limit on data does not count
for at in range(0, len(held), 4096): held[at] = 1
got = len(held)
del held
time.sleep(1)"""
FORKS = """
children = []
try:
    while len(children) < 20:
        child = os.fork()
        if not child: os._exit(0)
        children.append(child)
finally:
    got = len(children)
    for child in children: os.waitpid(child, 0)"""
THREADS = """
wait, threads = threading.Event(), []
threading.stack_size(65536)
try:
    while len(threads) < 1500:
        thread = threading.Thread(target=wait.wait)
        thread.start()
        threads.append(thread)
finally:
    wait.set()
    for thread in threads: thread.join()
got = len(threads)"""
FILL = """
with open(scratch + "/large", "wb") as file:
    for _ in range(300): file.write(bytes(2**20))
got = os.path.getsize(scratch + "/large")
os.unlink(scratch + "/large")"""


@pytest.fixture(scope="module")
def outside(cell):
    return cell("open", **ENOUGH)


@pytest.fixture(scope="module")
def inside(cell):
    return cell("closed", **ENOUGH)


def new_processes(it, code, error, **given):
    """Make the attack, which must fail with ``error``; how many processes it took."""
    before, started = it.pid, []
    start = it._first_words
    it._first_words = lambda: started.append(1) or start()
    try:
        with pytest.raises(error) as raised:
            it.attack(code, **given)
        assert it.attack("got = 'alive'") == "alive", "the next task is done"
    finally:
        it._first_words = start
    assert (it.pid != before) == bool(started)
    return raised.value, len(started)


def test_memory_beyond_the_limit_is_refused(outside, cell):
    assert outside.attack(ALLOCATE) == 400 * 2**20
    error, processes = new_processes(cell("closed", task_memory_mb=300), ALLOCATE, FedtailorError)
    assert error.code == "memory" and processes == 0, "the kernel refused it, and the process lives"


def test_memory_that_the_kernel_does_not_count_ends_the_process(outside, cell):
    assert outside.attack(SHARE) == 400 * 2**20
    error, processes = new_processes(cell("closed", task_memory_mb=300), SHARE, LimitPassed)
    assert error.code == "memory" and processes == 1, "it was not tried again"
    assert "ended during attack: it took more memory than 300 MB (policy.task_memory_mb)" in str(error)


def test_a_loop_without_an_end_is_ended(outside, cell):
    assert outside.attack("end = time.time() + 3\nwhile time.time() < end: pass\ngot = True")
    error, processes = new_processes(cell("closed", task_seconds=2), "while True: pass", LimitPassed)
    assert error.code == "time" and processes == 1, "it was not tried again"
    assert "ended during attack: it took longer than 2 s" in str(error)


def test_sleeping_for_ever_is_ended_by_the_clock(cell):
    error, processes = new_processes(cell("closed", task_seconds=1), "time.sleep(1000)", LimitPassed)
    assert (error.code, processes) == ("time", 1) and "it took longer than 1 s (policy.task_seconds)" in str(error)


def test_a_fork_bomb_has_no_first_child(outside, inside):
    assert outside.attack(FORKS) == 20
    with pytest.raises(FedtailorError, match="Errno 1"):
        inside.attack(FORKS)
    assert not Path(f"/proc/{inside.pid}/task/{inside.pid}/children").read_text()


def test_threads_are_bounded(site, outside, inside):
    if (os.geteuid() if site.user is None else site.user) == 0:
        pytest.skip("the kernel does not count the threads of root; memory bounds them")
    if inside.confinement.network != "both":
        pytest.skip("without a user namespace the limit would be shared with all that this user runs")
    assert outside.attack(THREADS) == 1500
    with pytest.raises(FedtailorError, match="can't start new thread"):
        inside.attack(THREADS)


def test_a_file_has_a_greatest_size(outside, cell):
    assert outside.attack(FILL, scratch=str(outside.scratch)) == 300 * 2**20
    it = cell("closed", task_memory_mb=200)
    error, processes = new_processes(it, FILL, FedtailorError, scratch=str(it.scratch))
    assert "File too large" in str(error) and processes == 0
    assert (it.scratch / "large").stat().st_size <= 200 * 2**20


@pytest.fixture
def cores():
    """As on a host where whoever starts the daemon wants cores."""
    before = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_CORE, before)


def test_no_core_is_left_behind(site, outside, cell, cores, monkeypatch):
    """It would hold the site's rows. Landlock would forbid it too: here it is left out."""
    inside = cell("closed", "no-files", **ENOUGH)
    folder = site.folder / "other"
    monkeypatch.chdir(folder)
    for it in (outside, inside):
        it._end()  # the next one is started in this folder
    error, processes = new_processes(outside, "os.abort()", WorkerDied)
    assert "code -6" in str(error) and processes == 4, "three tries, and the next task"
    found = list(folder.glob("core*"))
    for core in found:
        core.unlink()
    if not found:
        pytest.skip("this host dumps no core into the folder anyhow")
    error, _ = new_processes(inside, "os.abort()", WorkerDied)
    assert "code -6" in str(error) and not list(folder.glob("core*"))


# --- what it says ---


def test_an_answer_that_does_not_end_is_none(cell):
    error, _ = new_processes(cell("closed"), "got = 'x' * 2**21", WorkerDied)
    assert "during attack" in str(error)


@pytest.mark.parametrize("said", ["[1]", "7", "nothing", "[" * 100_000, '{"a": '])
def test_what_is_no_answer_is_not_read(cell, said):
    code = "import sys; os.write(3, said.encode() + b'\\n'); time.sleep(100)"
    error, _ = new_processes(cell("closed"), code, WorkerDied, said=said)
    assert "during attack" in str(error)


def test_what_it_says_leaves_no_trace_in_a_terminal_and_no_word_for_the_coordinator(inside):
    with pytest.raises(FedtailorError) as error:
        inside.attack("raise FedtailorError('row 17\\n\\x1b[31m' + 'x' * 10000, code='patient 17 has it')")
    assert error.value.code == "worker" and str(error.value).startswith("row 17  [31mx")
    assert str(error.value).isprintable() and len(str(error.value)) == 2000
