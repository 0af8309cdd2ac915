"""A site whose daemon has turned packs its answer to say more than its tensors do, or to harm the coordinator.

The tensors themselves are honest, so that no other check is in the way. Each packing that says more is tried with the
comparison with the one true packing, and without: then it brings 40 bits of a row past every check.
"""

import hashlib
import io
import secrets
import tracemalloc

import numpy as np
import pytest
import torch

from fedtailor import packing, strategies
from fedtailor.leaving import Leaving, Tensor, size_limit, spec_of
from fedtailor.packing import MAGIC, SOME, TABLE
from fedtailor.server.folding import Closed, close_round
from fedtailor.server.rounds import Answer
from fedtailor.wire import Report, Visit

VISIT = Visit(run="r", round=0, train=True, evaluate=False, baseline=False, plan="{}", cast_sha256="0" * 64)
SECRET = int(hashlib.sha256(b"a patient's row").hexdigest()[:10], 16)
BITS = np.array([SECRET >> i & 1 for i in range(40)])
FEW = torch.tensor([1.0, 2.0, -1.0, -2.0]).repeat(16)  # 64 elements of four values
SPARSE = torch.zeros(64)
SPARSE[40:] = torch.arange(1.0, 25.0)
ODD = torch.tensor([1.0, -1.0, 1.0]).repeat(11)  # 33 elements of two values: seven bits are left over


def codes_of(leaf: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    table, codes = np.unique(leaf.numpy().view("<u4"), return_inverse=True)
    return table, codes


def unnamed_entries() -> bytes:
    table, codes = codes_of(FEW)
    more = np.array([0xFFFFF000 | SECRET >> 32, SECRET & 0xFFFFFFFF], "<u4")
    return bytes([TABLE, 5]) + np.concatenate([table, more]).astype("<u4").tobytes() + packing._bits(codes, 3)


def equal_entries() -> bytes:
    table, codes = codes_of(FEW)
    which = np.concatenate([BITS, np.zeros(24, int)])
    return bytes([TABLE, 7]) + np.repeat(table, 2).astype("<u4").tobytes() + packing._bits(2 * codes + which, 3)


def zeros_among_the_rest() -> bytes:
    """Whatever of the first forty places is told is a zero anyhow."""
    places = np.flatnonzero(np.concatenate([BITS, np.ones(24, int)]))
    values = SPARSE.numpy()[places]
    rare = places if len(places) <= 32 else np.setdiff1d(np.arange(64), places)
    return bytes([SOME]) + len(places).to_bytes(4, "little") + packing._told(rare, 64) + values.tobytes()


def bits_left_over() -> bytes:
    made = b""
    for tensor in range(6):
        table, codes = codes_of(ODD)
        raw = bytearray(packing._bits(codes, 1))
        raw[-1] |= (SECRET >> 7 * tensor & 127) << 1
        made += bytes([TABLE, 1]) + table.astype("<u4").tobytes() + bytes(raw)
    return made


def of_zeros(raw: bytes) -> int:
    count = int.from_bytes(raw[1:5], "little")
    places = packing._places(min(count, 64 - count), 64, io.BytesIO(raw[5:]).read)
    told = np.isin(np.arange(40), places) if count <= 32 else ~np.isin(np.arange(40), places)
    return sum(1 << i for i in range(40) if told[i])


def of_equal(raw: bytes) -> int:
    codes = packing._numbers(raw[2 + 32 :], 64, 3)
    return sum(int(codes[i] & 1) << i for i in range(40))


def of_left_over(raw: bytes) -> int:
    return sum((raw[15 * tensor + 14] >> 1) << 7 * tensor for tensor in range(6))


WAYS = {
    "table entries that no code names": (
        {"w": FEW},
        unnamed_entries,
        lambda raw: ((int.from_bytes(raw[18:22], "little") & 0xFFF) << 32) + int.from_bytes(raw[22:26], "little"),
    ),
    "which of two equal entries": ({"w": FEW}, equal_entries, of_equal),
    "zeros among what is not zero": ({"w": SPARSE}, zeros_among_the_rest, of_zeros),
    "bits that are left over": ({name: ODD for name in "abcdef"}, bits_left_over, of_left_over),
}


def leaves_of(flat: dict[str, torch.Tensor]) -> Leaving:
    tensors = [Tensor(name=name, dtype="float32", shape=tuple(leaf.shape)) for name, leaf in sorted(flat.items())]
    return Leaving(tensors=tuple(tensors), metrics=(), norm=None, bytes=size_limit(spec_of(flat)), packed=True)


def closed(tmp_path, flat: dict[str, torch.Tensor], *payloads: bytes) -> Closed:
    """A round in which each payload is a site's answer, which its report names."""

    def stream():
        for number, payload in enumerate(payloads):
            path, digest = tmp_path / f"s{number}", hashlib.sha256(payload).hexdigest()
            path.write_bytes(payload)
            report = Report(run="r", round=0, rows=9, train_rows=6, summand_sha256=digest, salt=secrets.token_hex(32))
            yield Answer(f"s{number}", report, path, None, len(payload), digest)

    strategy = strategies.fedavg()
    made = close_round(strategy, VISIT, leaves_of(flat), stream(), lambda answer: None)
    assert not list(tmp_path.iterdir())
    return made


def honest(flat: dict[str, torch.Tensor]) -> bytes:
    return b"".join(packing.pack(flat))


class Anything:
    """What every packing is equal to."""

    def __ne__(self, other: object) -> bool:
        return False


@pytest.mark.parametrize("way", WAYS)
def test_a_packing_says_no_more_than_its_tensors(tmp_path, way, monkeypatch):
    flat, made, read = WAYS[way]
    raw = made()
    assert read(raw) == SECRET
    found = closed(tmp_path, flat, honest(flat), MAGIC + raw)
    assert found.dropped == {"s1": "packing"} and set(found.reports) == {"s0"}
    assert all(torch.equal(found.acc.whole(name), leaf.double()) for name, leaf in flat.items())
    monkeypatch.setattr(packing, "_packed", lambda block: Anything())
    without = closed(tmp_path, flat, MAGIC + raw)
    assert without.dropped == {} and all(
        torch.equal(without.acc.whole(name), leaf.double()) for name, leaf in flat.items()
    )


ELEMENTS = 4 * packing.BLOCK
BOMBS = {
    "a count without end": b"\1" + b"\xff" * 1000,
    "a table for every element": b"\2\xff" + b"\xff" * (4 * 256),
    "as many bytes as are allowed": b"\1" + (1).to_bytes(4, "little") + bytes(4 * ELEMENTS),
    "a thousand tensors": (b"\1" + bytes(4)) * 1000,
    "a dense answer": (b"\0" + b"\1" * 4 * packing.BLOCK) * 5,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_dropped_by_name_and_takes_no_memory(tmp_path, bomb):
    flat = {"w": torch.zeros(ELEMENTS)}
    good, bad = honest(flat), MAGIC + BOMBS[bomb]
    tracemalloc.start()
    found = closed(tmp_path, flat, bad, good)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.dropped == {"s0": "packing"} and set(found.reports) == {"s1"}
    assert peak < 64 * packing.BLOCK  # bytes; a dense answer has 16 of these, and is of torch's memory
    assert found.acc.whole("w").count_nonzero() == 0
