"""Coarse tensors in few bytes, without loss: what a site's daemon sends of a summand whose strategy shrinks it.

Tensors are cut into blocks of ``BLOCK`` elements, and each block takes the shortest of four forms: its elements as they
are or only those that are not zero, each in full or as a code into a table of at most 256. Elements are bit patterns:
minus zero and NaN stay what they are. Where the rarer kind of element is, zero or not, is told by Elias-Fano codes
(Elias 1974, https://doi.org/10.1145/321812.321820): about ``2 + log2(block / rare)`` bits each.

There is exactly one packing of given tensors. The receiver packs each block that it has read again and refuses any
other bytes, so that nobody can say more by a packing than the tensors say. No general compressor is used: its output
differs between versions, and its input could be a bomb. Here what a block unpacks to is known before it is read.

Format: ``MAGIC``; then block after block of each tensor, in the order of their names. A block is one byte of its form
(bit 0: only what is not zero; bit 1: table). With bit 0, the number of elements that are not zero (4 bytes), then the
places of the rarer kind. Then the elements; with bit 1 as table length less one (1 byte), table in ascending order,
codes of as few bits as suffice. Little-endian; bits are filled from the lowest, and the last byte of a run with zeros.
"""

from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtailor import store
from fedtailor.errors import WireError
from fedtailor.store import Spec

MAGIC = b"fedtailor.packed/1\n"
BLOCK = 1 << 18  # elements: what packing holds in memory beside the tensors is some tens of these
MOST = 256  # entries of a table
SOME, TABLE = 1, 2  # bits of a block's form
Words = NDArray[Any]  # elements as unsigned integers of their width, [n]
Take = Callable[[int], bytes]  # the next bytes, exactly as many


def pack(flat: dict[str, Tensor]) -> Iterator[bytes]:
    """Tensors of any dtype that :mod:`fedtailor.store` knows, packed, piece by piece; never longer than
    ``len(MAGIC)`` bytes and one a block more than what they take in memory."""
    yield MAGIC
    for name in sorted(flat):
        for block in _blocks(flat[name]):
            yield _packed(block)


def unpack(source: BinaryIO, spec: Spec) -> dict[str, Tensor]:
    """The tensors of these dtypes and shapes from what :func:`pack` made of them. Memory is theirs and a few blocks.

    Raises:
        WireError: code ``packing``, if ``source`` is anything but their one packing.
    """
    seen: list[bytes] = []

    def take(count: int) -> bytes:
        seen.append(source.read(count))
        if len(seen[-1]) != count:
            raise _wrong("it ends too early")
        return seen[-1]

    if take(len(MAGIC)) != MAGIC:
        raise _wrong("it is not in this format")
    flat: dict[str, Tensor] = {}
    for name, (dtype, shape) in sorted(spec.items()):
        flat[name] = torch.empty(shape, dtype=dtype, device="cpu")
        for block in _blocks(flat[name]):
            seen.clear()
            _fill(block, take)
            if _packed(block) != b"".join(seen):
                raise _wrong(f"a block of {name} is not in its one form")
    if source.read(1):
        raise _wrong("it goes on after the last tensor")
    return flat


def _blocks(leaf: Tensor) -> Iterator[Words]:
    """Views of a tensor's memory."""
    if leaf.numel():
        words: Words = np.frombuffer(store.raw(leaf), f"<u{leaf.element_size()}")
        yield from (words[begin : begin + BLOCK] for begin in range(0, len(words), BLOCK))


def _packed(block: Words) -> bytes:
    """One block in its shortest form; of equally long ones, the first."""
    lit = block != 0
    some, table = block[lit], _table(block[lit])
    unlit = np.zeros(int(len(some) < len(block)), block.dtype)
    whole = None if table is None or len(unlit) + len(table) > MOST else np.concatenate([unlit, table])
    rare = _rare(len(some), len(block))
    where = 4 + sum(_lengths(rare, len(block)))
    sizes = {0: block.nbytes, SOME: where + some.nbytes}
    if whole is not None:
        sizes[TABLE] = _coded(len(block), whole)
    if table is not None:
        sizes[SOME | TABLE] = where + _coded(len(some), table)
    form = min(sizes, key=lambda form: (sizes[form], form))
    told = b""
    if form & SOME:
        places = np.flatnonzero(lit if rare == len(some) else ~lit)
        told, block, whole = len(some).to_bytes(4, "little") + _told(places, len(block)), some, table
    if not form & TABLE:
        return bytes([form]) + told + block.tobytes()
    assert whole is not None
    codes = np.searchsorted(whole, block)
    return bytes([form]) + told + bytes([len(whole) - 1]) + whole.tobytes() + _bits(codes, _width(len(whole)))


def _fill(block: Words, take: Take) -> None:
    """Read one block. What is taken and made follows from the block's length, whatever is read."""
    form = take(1)[0]
    if not form & SOME:
        block[:] = _elements(len(block), block.dtype, form, take)
        return
    count = int.from_bytes(take(4), "little")
    if count > len(block):
        raise _wrong("a block counts more elements than it has")
    lit = np.zeros(len(block), bool)
    rare = _rare(count, len(block))
    lit[_places(rare, len(block), take)] = True
    lit = lit if rare == count else ~lit
    block[:] = 0
    block[lit] = _elements(count, block.dtype, form, take)


def _elements(count: int, dtype: "np.dtype[Any]", form: int, take: Take) -> Words:
    if not form & TABLE:
        return np.frombuffer(take(count * dtype.itemsize), dtype)
    entries = take(1)[0] + 1
    table = np.frombuffer(take(entries * dtype.itemsize), dtype)
    width = _width(entries)
    codes = _numbers(take(_bytes(count * width)), count, width)
    if len(codes) and codes.max() >= entries:
        raise _wrong("a code is beyond its table")
    found: Words = table[codes]
    return found


def _table(words: Words) -> Words | None:
    """The distinct elements in ascending order, or None where they are too many."""
    for part in (words[:4096], words):  # most blocks without a table are done with after a few elements
        found = np.unique(part)
        if len(found) > MOST:
            return None
    return found


def _coded(count: int, table: Words) -> int:
    return 1 + table.nbytes + _bytes(count * _width(len(table)))


def _width(entries: int) -> int:
    """Bits of a code."""
    return max(entries - 1, 0).bit_length()


# --- places: ``rare`` of ``size``, ascending, each with its low bits as they are and its high bits in unary ---


def _rare(count: int, size: int) -> int:
    """How many places are told where ``count`` elements are not zero: theirs, or the zeros' where those are fewer."""
    return min(count, size - count)


def _split(rare: int, size: int) -> tuple[int, int]:
    """The low bits of a place, and all bits of the unary part."""
    low = (size // rare).bit_length() - 1 if rare else 0
    return low, rare + (size - 1 >> low) if rare else 0


def _lengths(rare: int, size: int) -> tuple[int, int]:
    """The bytes of both parts."""
    low, unary = _split(rare, size)
    return _bytes(rare * low), _bytes(unary)


def _told(places: Words, size: int) -> bytes:
    low, unary = _split(len(places), size)
    flags = np.zeros(unary, np.uint8)
    flags[(places >> low) + np.arange(len(places))] = 1
    return _bits(places, low) + np.packbits(flags, bitorder="little").tobytes()


def _places(rare: int, size: int, take: Take) -> Words:
    low, unary = _split(rare, size)
    lows, highs = (take(length) for length in _lengths(rare, size))
    ones = np.flatnonzero(np.unpackbits(np.frombuffer(highs, np.uint8), count=unary, bitorder="little"))
    if len(ones) != rare:
        raise _wrong("a block tells other places than it counts")
    places: Words = (ones - np.arange(rare)) << low | _numbers(lows, rare, low)
    if rare and (places[-1] >= size or (np.diff(places) < 1).any()):
        raise _wrong("a block tells places that are not in order")
    return places


# --- bits ---


def _bytes(bits: int) -> int:
    return (bits + 7) // 8


def _bits(numbers: Words, width: int) -> bytes:
    """The lowest ``width`` bits of each number, one after another."""
    octets = numbers.astype("<u4").view(np.uint8).reshape(-1, 4)
    return np.packbits(np.unpackbits(octets, axis=1, bitorder="little")[:, :width], bitorder="little").tobytes()


def _numbers(raw: bytes, count: int, width: int) -> Words:
    """The inverse of :func:`_bits`."""
    bits = np.unpackbits(np.frombuffer(raw, np.uint8), count=count * width, bitorder="little").reshape(count, width)
    octets = np.zeros((count, 4), np.uint8)
    octets[:, : _bytes(width)] = np.packbits(bits, axis=1, bitorder="little")
    numbers: Words = octets.view("<u4")[:, 0]
    return numbers


def _wrong(why: str) -> WireError:
    return WireError(f"tensors that are not packed as agreed: {why}", code="packing")
