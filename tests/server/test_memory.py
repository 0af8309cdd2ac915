"""What is handed back is what can be read again."""

import subprocess
import sys

from fedtailor.server.memory import KEPT, unwritten

SMAPS = """\
1000-3000 r-xp 00000000 08:01 1                          /usr/lib/libone.so
Rss:                   8 kB
Anonymous:             0 kB
3000-5000 r--p 00002000 08:01 1                          /usr/lib/libone.so
Anonymous:             4 kB
5000-6000 rw-p 00004000 08:01 1                          /usr/lib/libone.so
Anonymous:             0 kB
6000-7000 r-xp 00000000 00:00 0                          [vdso]
Anonymous:             0 kB
7000-8000 r--p 00000000 00:00 0 
Anonymous:             0 kB
8000-9000 r--s 00000000 08:01 2                          /srv/shared
Anonymous:             0 kB
a000-c000 r--p 00000000 08:01 3                          /usr/lib/a library.so
Anonymous:             0 kB
c000-d000 rwxp 00000000 08:01 3                          /usr/lib/a library.so
Anonymous:             0 kB
"""  # noqa: W291

LIVE = """
import torch
from fedtailor.server.memory import drop_code

def resident():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile:"))

def work():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, requires_grad=True)
    torch.linalg.norm(torch.nn.GRU(3, 4)(x)[0]).backward()
    return x.grad

first, before = work(), resident()
drop_code()
after = resident()
assert torch.equal(work(), first)
print(before, after)
"""


def test_only_a_files_unwritten_pages_are_let_go() -> None:
    assert list(unwritten(SMAPS.splitlines(keepends=True))) == [(0x1000, 0x3000), (0xA000, 0xC000)]


def test_half_of_the_code_is_let_go_and_all_of_it_still_runs() -> None:
    ran = subprocess.run([sys.executable, "-c", LIVE], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    before, after = map(int, ran.stdout.split())
    assert after < before / 2


CHUNKS = """
import os, threading
from fedtailor import heap
from fedtailor.server import memory

CHUNK, PEERS = 5 * 2**20, 24

def resident():
    with open("/proc/self/statm") as line:
        return int(line.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def passes(barrier):
    barrier.wait()
    for _ in range(6):
        copies = [b"x" * CHUNK for _ in range(2)]
        barrier.wait()
        del copies
        barrier.wait()

memory.keep_heaps_few()
before = resident()
barrier = threading.Barrier(PEERS)
threads = [threading.Thread(target=passes, args=[barrier]) for _ in range(PEERS)]
[t.start() for t in threads]; [t.join() for t in threads]
heap.trim()
print(resident() - before)
"""


def test_nothing_stays_of_what_passed_through_many_threads() -> None:
    ran = subprocess.run([sys.executable, "-c", CHUNKS], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    # Without keep_heaps_few 90 MB, in heaps of their own that nobody trims. Of the second heap, glibc trims all but its end:
    # there KEPT bytes may lie, and do if the last that a thread frees lay there.
    assert int(ran.stdout) < KEPT + 2**20
