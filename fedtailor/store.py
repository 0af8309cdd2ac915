"""Files that are there whole or not at all, and trees of tensors in safetensors with a checksum. No pickle."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedtailor import tree
from fedtailor.errors import StoreError
from fedtailor.tree import Tree

CHECKSUM = "fedtailor.sha256"
DTYPES = {  # the names that safetensors gives them; in its files the widest come first, so that each tensor is aligned
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = list(DTYPES.values())
Spec = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # path of a tensor -> dtype and shape


def write_bytes(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace ``path`` by ``data``: after a crash or on a full disk, the old file is there unharmed.

    Raises:
        StoreError: naming the file and what to do.
    """
    write_pieces(path, [data], mode)


def write_pieces(path: Path, pieces: Iterable[bytes | bytearray | memoryview], mode: int = 0o600) -> None:
    """:func:`write_bytes` of data that is better not held in memory at once."""
    with replacing(path, mode) as file:
        for piece in pieces:
            file.write(piece)


@contextmanager
def replacing(path: Path, mode: int = 0o600) -> Iterator[BinaryIO]:
    """A draft, to be written and read in any order, that takes the place of ``path`` when the context ends well.

    Raises:
        StoreError: naming the file and what to do; the old file is there unharmed.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        with os.fdopen(_open_alone(draft, mode), "w+b") as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(draft, path)
            except BaseException:
                draft.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise _unwritable(path, error) from error
    sync_name(path)


def write_text(path: Path, text: str, mode: int = 0o600) -> None:
    """:func:`write_bytes` of UTF-8."""
    write_bytes(path, text.encode(), mode)


def write_json(path: Path, document: Any, mode: int = 0o600) -> None:
    """:func:`write_bytes` of a JSON document; NaN and infinity are refused."""
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n", mode)


def save_tree(path: Path, saved: Tree, metadata: dict[str, str]) -> None:
    """Replace ``path`` by a safetensors file of ``saved`` and ``metadata``, with a checksum over both.

    Besides ``saved``, at most one copy of its largest tensor is in memory, and none where tensors are contiguous on the
    CPU. Two names for one tensor become two tensors; empty branches are not kept.

    Raises:
        StoreError: if it cannot be written; the old file is there unharmed.
    """
    flat = tree.flatten(saved)
    write_pieces(path, safetensors(flat, metadata | {CHECKSUM: _checksum(flat, metadata)}))


def safetensors(flat: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Iterator[bytes | memoryview]:
    """A safetensors file, piece by piece: made whole in memory it would cost a copy of the model.

    Raises:
        StoreError: naming a tensor whose dtype the format has no word for here.
    """
    head, spans = layout({name: (leaf.dtype, tuple(leaf.shape)) for name, leaf in flat.items()}, metadata)
    yield head
    for name in spans:
        yield raw(flat[name])


class Span(NamedTuple):
    """Where a tensor's bytes lie in a file, and what they are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the beginning of the file

    @property
    def numbers(self) -> int:
        """How many it has."""
        return torch.Size(self.shape).numel()

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.numbers * self.dtype.itemsize


def layout(spec: Spec, metadata: dict[str, str] | None = None) -> tuple[bytes, dict[str, Span]]:
    """The header of a safetensors file with tensors of these dtypes and shapes, and where they lie, in their order.

    Raises:
        StoreError: naming a tensor whose dtype the format has no word for here.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    spans, begin = dict[str, Span](), 0
    for name in sorted(spec, key=lambda name: (_ORDER.index(_dtype(name, spec[name][0])), name)):
        spans[name] = Span(*spec[name], begin)
        end = begin + spans[name].size
        header[name] = {"dtype": DTYPES[spec[name][0]], "shape": list(spec[name][1]), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: span._replace(begin=len(head) + span.begin) for name, span in spans.items()}


def load_tree(path: Path) -> tuple[Tree, dict[str, str]]:
    """The tree and metadata of a file made by :func:`save_tree`.

    Raises:
        StoreError: if it cannot be read or was changed since.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = dict(file.metadata() or {})
            flat = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (else a view of the file)
    except (OSError, SafetensorError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {error}; restore it from a copy") from error
    wanted = metadata.pop(CHECKSUM, None)
    if wanted != _checksum(flat, metadata):
        raise StoreError(f"{path} is damaged: its checksum does not match; restore it from a copy")
    return tree.unflatten(flat), metadata


def commit_folder(draft: Path, target: Path) -> None:
    """Make a finished folder appear under its name, by one rename. A folder already there is kept."""
    try:
        _sync(draft)
        os.rename(draft, target)
    except OSError as error:
        if target.exists():
            return
        raise _unwritable(target, error) from error
    sync_name(target)


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal, read piece by piece."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}; restore it from a copy") from error


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder, made if there is none, so that what one run writes there is not mixed with another's.

    Raises:
        StoreError: if another process holds it, or it cannot be made.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError(f"{folder} cannot be made: {error.strerror}; choose another folder") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise StoreError(f"{folder} is being written by another run; wait for it, or choose another folder") from error
    except OSError:
        pass  # a file system that has no locks
    try:
        yield
    finally:
        os.close(handle)
        if made:
            with suppress(OSError):  # what failed before it wrote anything leaves nothing
                folder.rmdir()


def _open_alone(draft: Path, mode: int) -> int:
    """Open and empty ``draft``, waiting for whoever writes it now.

    One name, rather than a new one each time, leaves at most one draft behind after ``kill -9``, and the next write
    takes it over. The lock keeps two writers of one file apart.
    """
    while True:
        handle = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_at(handle, draft):
                os.fchmod(handle, mode)
                os.ftruncate(handle, 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the writer before us has renamed it: what we hold is the finished file


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def sync_name(path: Path) -> None:
    """Make a new file's name survive a power failure."""
    try:
        _sync(path.parent)
    except OSError as error:
        raise StoreError(
            f"{path} is written, but its folder cannot be synchronised ({error.strerror}): "
            "it may not survive a power failure; mend the disk and write it again"
        ) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unwritable(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{path} cannot be written: {error.strerror or error}; free space or mend its permissions, nothing was changed"
    )


def _dtype(name: str, dtype: torch.dtype) -> str:
    if dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise StoreError(f"tensor {name!r} has dtype {dtype}, which cannot be stored; convert it to one of {known}")
    return DTYPES[dtype]


def raw(leaf: Tensor) -> bytes | memoryview:
    """A tensor's bytes, without a copy where it is contiguous and on the CPU."""
    if not leaf.numel():
        return b""
    flat = leaf.detach().cpu().contiguous().as_strided((leaf.numel(),), (1,))  # one element may have any stride
    octets: memoryview = flat.view(torch.uint8).numpy().data
    return octets


def _checksum(flat: dict[str, Tensor], metadata: dict[str, str]) -> str:
    return checksum(((name, leaf.dtype, leaf.shape, [raw(leaf)]) for name, leaf in sorted(flat.items())), metadata)


def checksum(
    tensors: Iterable[tuple[str, torch.dtype, Iterable[int], Iterable[bytes | memoryview]]], metadata: dict[str, str]
) -> str:
    """What :func:`save_tree` notes: SHA-256 over metadata and tensors by name, dtype, shape and pieces of bytes."""
    total = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, dtype, shape, pieces in tensors:
        total.update(f"\0{name}\0{dtype}\0{list(shape)}\0".encode())
        for piece in pieces:
            total.update(piece)
    return total.hexdigest()
