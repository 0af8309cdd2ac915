"""``kill -9`` while a signed log is written: whatever was half-written is kept and named."""

import os
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedtailor.client.chain import Chain, read, rows
from fedtailor.client.signing import Signer
from fedtailor.client.verify_audit import follow

SIGNER = Signer(ec.derive_private_key(20260101, ec.SECP384R1()))
PROCESS = """
import os, signal, sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric import ec
from fedtailor.client.chain import Chain
from fedtailor.client.signing import Signer
path, when, rounds, half = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def torn(handle, data, at, real=os.pwrite):
    real(handle, data[: int(len(data) * half)], at)
    die()
signer = Signer(ec.derive_private_key(20260101, ec.SECP384R1()))
if rounds:
    chain = Chain(path, signer)
for round in range(rounds):
    chain.append(round=round, text="x" * 100)
if when == "writing":
    os.pwrite = torn
elif when == "written":
    os.ftruncate = die
elif when == "set aside":
    Chain._set_aside = lambda self, torn, real=Chain._set_aside: (real(self, torn), die())
Chain(path, signer).append(round=rounds, text="x" * int(sys.argv[5]))
"""


def die(path, when, rounds=3, half=0.5, length=100):  # a length of 5000: longer than the record that names it
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    arguments = [str(path), when, str(rounds), str(half), str(length)]
    done = subprocess.run([sys.executable, "-c", PROCESS, *arguments], env=env, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL


def torn(path):
    """What stands behind the last whole line."""
    whole = path.read_bytes()
    return whole[whole.rfind(b"\n") + 1 :]


@pytest.mark.parametrize("half,rounds", [(0.01, 3), (0.999, 3), (0.5, 0)])
def test_half_a_line_is_set_aside_and_the_next_record_says_so(tmp_path, half, rounds):
    path = tmp_path / "egress.jsonl"
    die(path, "writing", rounds, half)
    lost = torn(path)
    assert lost and len(read(path)) == (rounds + 1 if rounds else 0)  # a reader leaves it out, and changes nothing
    chain = Chain(path, SIGNER)
    aside = path.with_name("egress.jsonl.torn")
    assert aside.read_bytes() == lost + b"\n" and aside.stat().st_mode & 0o777 == 0o600
    said = rows(path)[-1]
    assert (said["torn"], said["sha256"]) == (len(lost), sha256(lost).hexdigest())
    chain.append(round=4)
    assert follow("egress", read(path)).number == len(read(path)) == (rounds + 3 if rounds else 2)
    assert Chain(path, SIGNER).head == chain.head and aside.read_bytes() == lost + b"\n", "once"


@pytest.mark.parametrize(
    "when,length",
    [("set aside", 10), ("writing", 10), *[pytest.param("written", n, marks=pytest.mark.slow) for n in (10, 5000)]],
)
def test_a_second_kill_while_it_is_set_aside_loses_nothing(tmp_path, when, length):
    path = tmp_path / "egress.jsonl"
    die(path, "writing", length=length)
    lost = torn(path)
    die(path, when, rounds=0)
    chain = Chain(path, SIGNER)
    chain.append(round=4)
    assert lost in path.with_name("egress.jsonl.torn").read_bytes()
    assert follow("egress", read(path)).number == len(read(path))
    assert sha256(lost).hexdigest() in [row.get("sha256") for row in rows(path)] or when == "writing"
    assert any("torn" in row for row in rows(path)) and rows(path)[-1]["round"] == 4
    assert [row["round"] for row in rows(path) if "round" in row] == [0, 1, 2, 4]
