"""Trees on disk, read and written by slices: a process that holds one of these holds a few MB of it, whatever its size.

The bytes are read and written, not mapped: a page that is mapped counts as the process's own.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from fedtailor import store, tree
from fedtailor.errors import StoreError
from fedtailor.store import CHECKSUM, DTYPES, Span, Spec
from fedtailor.tree import Params, Tree

SLICE = 1 << 14  # numbers of a tensor that are in memory at a time: of eight bytes each, they fit a processor's cache
_BLANK = "0" * 64  # a checksum that is not known yet
_NAMES = {name: dtype for dtype, name in DTYPES.items()}


class TreeFile:
    """An open file and where each tensor lies in it, by path."""

    def __init__(self, file: BinaryIO, spans: Mapping[str, Span], metadata: dict[str, str] | None = None) -> None:
        self.file, self.spans, self.metadata = file, dict(spans), metadata or {}

    def read(self, path: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Numbers ``start`` to ``stop`` of a tensor, flat: [stop - start]."""
        span = self.spans[path]
        width, stop = span.dtype.itemsize, span.numbers if stop is None else stop
        octets = bytearray((stop - start) * width)
        self.fill(memoryview(octets), span.begin + start * width)
        return torch.frombuffer(octets, dtype=span.dtype) if octets else torch.empty(0, dtype=span.dtype)

    def fill(self, octets: memoryview, begin: int) -> None:
        """Read bytes of the file, from ``begin`` on.

        Raises:
            StoreError: if it is shorter.
        """
        while octets:
            got = os.preadv(self.file.fileno(), [octets], begin)
            if not got:
                raise StoreError(f"{self.file.name} ends before byte {begin + len(octets)}; restore it from a copy")
            octets, begin = octets[got:], begin + got

    def write(self, path: str, start: int, values: Tensor) -> None:
        """Put numbers [N] in place from the tensor's number ``start`` on."""
        span = self.spans[path]
        assert values.dtype == span.dtype and start + values.numel() <= span.numbers, path
        octets, at = memoryview(store.raw(values)), span.begin + start * span.dtype.itemsize
        while octets:
            put = os.pwrite(self.file.fileno(), octets, at)
            octets, at = octets[put:], at + put

    def slices(self, path: str) -> Iterator[tuple[int, int]]:
        """Where each slice of a tensor begins and ends; a tensor without numbers has one slice."""
        count = self.spans[path].numbers
        return ((start, min(start + SLICE, count)) for start in range(0, max(count, 1), SLICE))

    def whole(self, path: str) -> Tensor:
        """A tensor in memory."""
        return self.read(path).view(self.spans[path].shape)

    def tree(self) -> Tree:
        """All of it in memory."""
        return tree.unflatten({path: self.whole(path) for path in self.spans})

    def checksum(self) -> str:
        """Over its tensors and its other metadata: what :func:`fedtailor.store.save_tree` notes."""
        noted = {name: text for name, text in self.metadata.items() if name != CHECKSUM}
        return store.checksum(
            (
                (path, span.dtype, span.shape, (store.raw(self.read(path, *ends)) for ends in self.slices(path)))
                for path, span in sorted(self.spans.items())
            ),
            noted,
        )

    def seal(self) -> None:
        """Note the checksum in a file made by :func:`draft`, now that all is written."""
        self.metadata[CHECKSUM] = self.checksum()
        head, _ = store.layout(_spec(self.spans), self.metadata)
        os.pwrite(self.file.fileno(), head, 0)


def scratch(folder: Path, spec: Spec) -> TreeFile:
    """Tensors to be written, in a file of ``folder`` that has no name and is gone with the process."""
    spans, begin = dict[str, Span](), 0
    for path, (dtype, shape) in spec.items():
        spans[path] = Span(dtype, shape, begin)
        begin += spans[path].size
    return TreeFile(tempfile.TemporaryFile(dir=folder), spans)


def draft(file: BinaryIO, spec: Spec, metadata: dict[str, str]) -> TreeFile:
    """Begin a file like :func:`fedtailor.store.save_tree`'s: tensors are written, then it is sealed."""
    metadata = metadata | {CHECKSUM: _BLANK}
    head, spans = store.layout(spec, metadata)
    file.write(head)
    file.flush()
    return TreeFile(file, spans, metadata)


def opened(path: Path) -> TreeFile:
    """A file made by :func:`fedtailor.store.save_tree`, after its checksum was looked at.

    Raises:
        StoreError: if it cannot be read or was changed since.
    """
    try:
        made = _parsed(path.open("rb", buffering=0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} cannot be read: {error}; restore it from a copy") from error
    if made.metadata.get(CHECKSUM) != made.checksum():
        raise StoreError(f"{path} is damaged: its checksum does not match; restore it from a copy")
    return made


def received(path: Path, most: int) -> TreeFile:
    """A safetensors file of somebody else's; its tensors are not looked at.

    Args:
        most: bytes of its header.

    Raises:
        SafetensorError, OSError, ValueError: if it is none.
    """
    with path.open("rb") as file:
        if (length := int.from_bytes(file.read(8), "little")) > most:
            raise ValueError(f"a header of {length} bytes; at most {most}")
    with safe_open(path, framework="pt"):
        pass  # the library's own checks: no overlaps, no gaps, nothing else within
    return _parsed(path.open("rb", buffering=0))


def _parsed(file: BinaryIO) -> TreeFile:
    room = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > room - 8:
        raise ValueError("it ends within its header")
    header = json.loads(file.read(length))
    metadata: dict[str, str] = header.pop("__metadata__", {})
    spans = {}
    for path, said in header.items():
        begin, end = said["data_offsets"]
        span = Span(_NAMES[said["dtype"]], tuple(said["shape"]), 8 + length + begin)
        if min(begin, *span.shape, 0) < 0 or end - begin != span.size or 8 + length + end > room:
            raise ValueError(f"{path} is not where its header says")
        spans[path] = span
    return TreeFile(file, spans, metadata)


def _spec(spans: Mapping[str, Span]) -> Spec:
    return {path: (span.dtype, span.shape) for path, span in spans.items()}


Flat = Mapping[str, Tensor] | TreeFile  # tensors by path, in memory or on disk


def spec_of(flat: Flat) -> Spec:
    """What the tensors are, without reading one."""
    if isinstance(flat, TreeFile):
        return _spec(flat.spans)
    return {path: (leaf.dtype, tuple(leaf.shape)) for path, leaf in flat.items()}


def slices_of(flat: Flat, path: str) -> Iterator[Tensor]:
    """A tensor's numbers, flat, a slice at a time; one without numbers is one slice."""
    if isinstance(flat, TreeFile):
        return (flat.read(path, *ends) for ends in flat.slices(path))
    return iter(torch.split(flat[path].reshape(-1), SLICE))


class Excerpt:
    """A safetensors file of some of another's tensors, which is put together where it is read.

    Its bytes are those of :func:`fedtailor.store.safetensors` of the same tensors.
    """

    def __init__(self, source: TreeFile, names: Mapping[str, str]) -> None:
        """``names``: what a tensor is called here -> its path in ``source``."""
        spec = _spec({name: source.spans[path] for name, path in names.items()})
        self._head, spans = store.layout(spec)
        self._source = source
        self._parts = [(span.begin, span.size, source.spans[names[name]].begin) for name, span in spans.items()]
        self.size = len(self._head) + sum(size for _, size, _ in self._parts)  # bytes
        self.parameters = sum(span.numbers for span in spans.values())

    def read(self, start: int, stop: int) -> bytearray:
        """Bytes ``start`` to ``stop``."""
        out, head = bytearray(max(min(stop, self.size) - start, 0)), self._head[start:stop]
        out[: len(head)] = head
        room = memoryview(out)
        for begin, size, at in self._parts:
            low, high = max(start, begin), min(stop, begin + size)
            if low < high:
                self._source.fill(room[low - start : high - start], at + low - begin)
        return out

    def __iter__(self) -> Iterator[bytearray]:
        """All bytes, a piece at a time."""
        step = 64 * SLICE
        return (self.read(start, min(start + step, self.size)) for start in range(0, self.size, step))


Model = Params | Excerpt  # what is released: in memory, or a part of a checkpoint


def pieces_of(model: Model) -> Iterator[bytes | bytearray | memoryview]:
    """The safetensors file of a model, a piece at a time."""
    return iter(model) if isinstance(model, Excerpt) else store.safetensors(model)
