"""Packing: exact, as short as it should be, of one form only; and whatever is read, no more is made than was agreed."""

import hashlib
import io
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedtailor import packing, store, strategies, tree
from fedtailor.errors import WireError
from fedtailor.packing import BLOCK, MAGIC
from fedtailor.strategy import Local


def packed(flat):
    return b"".join(packing.pack(flat))


def spec_of(flat):
    return {name: (leaf.dtype, tuple(leaf.shape)) for name, leaf in flat.items()}


def unpacked(raw, spec):
    return packing.unpack(io.BytesIO(raw), spec)


def bits_of(leaf):
    return bytes(store.raw(leaf))


def assert_same(one, other):
    assert spec_of(one) == spec_of(other)
    assert {name: bits_of(leaf) for name, leaf in one.items()} == {name: bits_of(leaf) for name, leaf in other.items()}


def of_words(words, dtype):
    """A tensor of these bit patterns."""
    flat = torch.from_numpy(np.ascontiguousarray(words).reshape(-1).view(np.uint8)).view(dtype)
    return flat.reshape(words.shape)


KINDS = {torch.float32: "u4", torch.float64: "u8", torch.bfloat16: "u2", torch.int8: "u1", torch.int64: "u8"}


@st.composite
def tensors(draw):
    """Any bit patterns, NaN and minus zero among them: dense, of few values, or mostly zero."""
    dtype = draw(st.sampled_from(list(KINDS)))
    shape = draw(arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40))
    values = draw(st.lists(arrays.from_dtype(np.dtype(KINDS[dtype])), min_size=1, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    words = rng.choice(np.array(values, KINDS[dtype]), shape) if draw(st.booleans()) else rng.bytes(1)
    if isinstance(words, bytes):
        words = rng.integers(0, 256, (*shape, np.dtype(KINDS[dtype]).itemsize), np.uint8).view(KINDS[dtype])[..., 0]
    kept = rng.random(shape) < draw(st.sampled_from([0, 0.01, 0.1, 0.3, 0.5, 0.9, 1]))
    return of_words(np.asarray(words * kept, KINDS[dtype]), dtype)


some = st.dictionaries(st.text("abc/.", min_size=1, max_size=4), tensors(), max_size=4)


@given(some, st.integers(1, 200))
@settings(max_examples=100, deadline=None)
def test_what_is_unpacked_is_what_was_packed_bit_for_bit(flat, block):
    whole, before = packed(flat), packing.BLOCK
    try:
        packing.BLOCK = block
        raw = packed(flat)
        assert_same(unpacked(raw, spec_of(flat)), flat)
    finally:
        packing.BLOCK = before
    for made, blocks in ((whole, len(flat)), (raw, sum(-(-leaf.numel() // block) for leaf in flat.values()))):
        assert len(made) <= len(MAGIC) + sum(leaf.nbytes for leaf in flat.values()) + blocks


@given(some, st.data())
@settings(max_examples=200, deadline=None)
def test_anything_else_is_refused(flat, data):
    """One packing and no other: a byte changed, lost, put in or added is either other tensors' packing or none."""
    raw, spec = bytearray(packed(flat)), spec_of(flat)
    at = data.draw(st.integers(0, len(raw) - 1))
    how = data.draw(st.sampled_from(["changed", "lost", "put in", "cut", "added"]))
    if how == "changed":
        raw[at] ^= data.draw(st.integers(1, 255))
    elif how == "lost":
        del raw[at]
    elif how == "put in":
        raw.insert(at, data.draw(st.integers(0, 255)))
    elif how == "cut":
        del raw[at:]
    else:
        raw += data.draw(st.binary(min_size=1, max_size=9))
    try:
        found = unpacked(bytes(raw), spec)
    except WireError as error:
        assert error.code == "packing"
    else:
        assert packed(found) == raw and how in ("changed", "lost", "put in")


@given(st.binary(max_size=400), st.sampled_from([(), (1,), (7, 9), (100,), (0,)]), st.sampled_from(list(KINDS)))
@example(b"\3" + bytes(8), (100,), torch.float32)
@example(b"\2\0" + bytes(8), (100,), torch.float32)
@settings(max_examples=200, deadline=None)
def test_noise_is_refused_or_is_a_packing(noise, shape, dtype):
    try:
        found = unpacked(MAGIC + noise, {"w": (dtype, shape)})
    except WireError as error:
        assert error.code == "packing"
    else:
        assert packed(found) == MAGIC + noise


# --- the format, by hand ---


def only(raw):
    assert raw.startswith(MAGIC)
    return raw[len(MAGIC) :].hex()


def test_the_format_of_a_sparse_block():
    """One of sixteen: four low bits of its place, 5, and a one for its high bits, which are none."""
    leaf = torch.zeros(16)
    leaf[5] = 1.0
    assert only(packed({"w": leaf})) == "01" + "01000000" + "05" + "01" + "0000803f"


def test_the_format_of_places_with_high_bits():
    """Of 64 the places 3, 40 and 63: four low bits each (3, 8, 15), then high bits 0, 2, 3 in unary: 1 001 01."""
    leaf = torch.zeros(64, dtype=torch.float64)
    leaf[[3, 40, 63]] = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    values = struct.pack("<3d", 1.0, 2.0, 4.0).hex()
    assert only(packed({"w": leaf})) == "01" + "03000000" + "830f" + "29" + values


def test_the_format_of_a_block_of_few_values():
    """Of 2 and -2, ascending as bit patterns, sixteen codes of one bit."""
    leaf = torch.tensor([-2.0, 2.0] * 4 + [2.0] * 8)
    assert only(packed({"w": leaf})) == "02" + "01" + "00000040" + "000000c0" + "5500"


def test_the_zeros_places_are_told_where_they_are_fewer():
    leaf = torch.full((32,), 3.0)
    leaf[5] = 0
    assert only(packed({"w": leaf})) == "03" + "1f000000" + "05" + "01" + "00" + "00004040"


def test_tensors_follow_each_other_by_name_in_blocks_of_their_own():
    flat = {"b": torch.tensor([5], dtype=torch.int8), "a": torch.tensor([[7]], dtype=torch.int8)}
    assert only(packed(flat)) == "0007" + "0005"
    long = {"w": torch.arange(1, 2**18 + 3, dtype=torch.float32)}
    assert len(packed(long)) == len(MAGIC) + 1 + 4 * 2**18 + 1 + 8
    assert_same(unpacked(packed(long), spec_of(long)), long)


def test_a_tensor_is_packed_by_what_it_says_and_not_by_how_it_lies_in_memory():
    leaf = torch.arange(12.0).reshape(3, 4)
    assert packed({"w": leaf.T}) == packed({"w": leaf.T.contiguous()}) != packed({"w": leaf})
    assert packed({"w": torch.ones(5)[::5]}) == packed({"w": torch.ones(1)})


def test_minus_zero_and_nan_keep_their_bits():
    words = np.array([0x80000000, 0, 0x7FC00001, 0xFFC12345, 0, 0] * 50, np.uint32)
    flat = {"w": of_words(words, torch.float32)}
    assert_same(unpacked(packed(flat), spec_of(flat)), flat)


# --- how short ---


def sent(strategy, count=200_000):
    """What a client that moved at random sends of one large and one small tensor."""
    rng, one = torch.Generator().manual_seed(0), torch.tensor(1.0)
    zero = {"w": torch.zeros(count), "b": torch.zeros(10)}
    ends = {name: torch.randn(leaf.shape, generator=rng) for name, leaf in zero.items()}
    local = Local({"params": zero}, strategy.remember(zero), ends, one, one, 0.1, torch.tensor(3))
    return tree.flatten(strategy.report(local)[0])


@pytest.mark.parametrize(
    ("strategy", "least", "most"),
    [
        (strategies.topk(fraction=0.01), 75, 85),
        (strategies.quantise(bits=2), 16, 40),
        (strategies.quantise(bits=4), 7.5, 8.5),
        (strategies.quantise(bits=8), 3.9, 4.0),
        (strategies.sign(), 30, 32),
        (strategies.quantise(strategies.topk(fraction=0.01), bits=8), 170, 200),
        (strategies.fedavg(), 0.99, 1.0),
    ],
    ids=["topk 1 %", "2 bits", "4 bits", "8 bits", "sign", "8 bits of topk 1 %", "fedavg"],
)
def test_a_compression_saves_the_bytes_that_it_should(strategy, least, most):
    flat = sent(strategy)
    dense = sum(leaf.nbytes for leaf in flat.values())
    raw = packed(flat)
    assert least <= dense / len(raw) <= most
    assert_same(unpacked(raw, spec_of(flat)), flat)


def test_a_few_zeros_among_signs_cost_little():
    leaf = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).sign()
    leaf[::1000] = 0
    assert 8 * len(packed({"w": leaf})) < 1.02 * leaf.numel()


@pytest.mark.parametrize(("first", "last", "times"), [(1, 256, 3.84), (0, 255, 3.84), (1, 257, 1.0), (0, 256, 3.84)])
def test_a_table_has_256_entries_at_most(first, last, times):
    """Of 257 values one of which is nothing, those that are something still have codes, beside the places of nothing."""
    leaf = torch.arange(first, last + 1).repeat(100).float()
    raw = packed({"w": leaf})
    assert leaf.nbytes / len(raw) == pytest.approx(times, rel=0.01)
    assert torch.equal(unpacked(raw, spec_of({"w": leaf}))["w"], leaf)


# --- bombs ---


MANY = (2**32 - 1).to_bytes(4, "little")
BOMBS = {  # packings of a tensor of a million that say more than it holds
    "a count without end": (b"\1" + MANY, "counts more"),
    "a count of one too many": (b"\1" + (BLOCK + 1).to_bytes(4, "little") + bytes(4 * BLOCK), "counts more"),
    "all places in one": (
        b"\1" + (1000).to_bytes(4, "little") + bytes(1000) + b"\xff" * 158 + bytes(4000),
        "other places than it counts",
    ),
    "no places": (b"\1" + (1000).to_bytes(4, "little") + bytes(5000), "other places than it counts"),
    "another form": (b"\4" + bytes(4 * BLOCK), "not in its one form"),
    "codes beyond the table": (b"\2\2" + bytes(12) + b"\xff" * (BLOCK // 4), "beyond its table"),
    "nothing": (b"", "too early"),
    "more after the last": ((b"\1" + bytes(4)) * 4 + b"\1" * 1000, "after the last"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_does_not_go_off(name):
    raw, why = BOMBS[name]
    spec = {"w": (torch.float32, (4 * BLOCK,))}
    tracemalloc.start()
    with pytest.raises(WireError, match=why) as error:
        unpacked(MAGIC + raw, spec)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.value.code == "packing"
    assert peak < len(raw) + 64 * BLOCK  # bytes, beside the tensor itself: that of a block or two


@pytest.mark.parametrize("places", [[0, 5], [3, 3], [3, 2]])
def test_places_beyond_the_block_or_out_of_order_are_refused(places):
    """Of five, two: one low bit each, and high bits in unary."""
    flags = sum(1 << (place // 2 + i) for i, place in enumerate(places))
    raw = b"\1" + (2).to_bytes(4, "little") + bytes([places[0] % 2 + 2 * (places[1] % 2), flags])
    with pytest.raises(WireError, match="not in order"):
        unpacked(MAGIC + raw + struct.pack("<2f", 1.0, 2.0), {"w": (torch.float32, (5,))})


def test_memory_is_that_of_the_tensors_and_a_few_blocks():
    """The most that packing and unpacking hold at a time does not grow with the tensors."""
    peaks = []
    for blocks in (2, 8):
        leaf = torch.randn(blocks * BLOCK, generator=torch.Generator().manual_seed(0)).mul(2).round()
        source = io.BytesIO(packed({"w": leaf}))
        tracemalloc.start()
        total = hashlib.sha256()
        for piece in packing.pack({"w": leaf}):
            total.update(piece)
        del piece
        packing.unpack(source, spec_of({"w": leaf}))
        peaks.append(tracemalloc.get_traced_memory()[1])  # numpy's memory and bytes; torch's own is not traced
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 80 * BLOCK
