"""Files that are there whole or not at all, and trees of tensors in safetensors with a checksum. No pickle."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedtailor import tree
from fedtailor.errors import StoreError
from fedtailor.tree import Tree

CHECKSUM = "sha256"


def write_bytes(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace ``path`` by ``data``: after a crash or on a full disk, the old file is there unharmed.

    Raises:
        StoreError: naming the file and what to do.
    """
    _replace(path, lambda file: file.write(data), mode)


def write_text(path: Path, text: str, mode: int = 0o600) -> None:
    """:func:`write_bytes` of UTF-8."""
    write_bytes(path, text.encode(), mode)


def write_json(path: Path, document: Any, mode: int = 0o600) -> None:
    """:func:`write_bytes` of a JSON document; NaN and infinity are refused."""
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n", mode)


def save_tree(path: Path, saved: Tree, metadata: dict[str, str]) -> None:
    """Replace ``path`` by a safetensors file of ``saved`` and ``metadata``, with a checksum over both."""
    flat = {name: leaf.detach().cpu().contiguous() for name, leaf in tree.flatten(saved).items()}
    signed = metadata | {CHECKSUM: _checksum(flat, metadata)}
    draft = path.with_name(f".{path.name}.draft")
    try:
        save_file(flat, draft, metadata=signed)
        draft.chmod(0o600)
        _sync(draft)
        os.replace(draft, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        draft.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def load_tree(path: Path) -> tuple[Tree, dict[str, str]]:
    """The tree and metadata of a file made by :func:`save_tree`.

    Raises:
        StoreError: if it cannot be read or was changed since.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = dict(file.metadata() or {})
            flat = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
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
        _sync(target.parent)
    except OSError as error:
        if not target.exists():
            raise _unwritable(target, error) from error


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(path: Path, write: Callable[[IO[bytes]], object], mode: int) -> None:
    draft = path.with_name(f".{path.name}.draft")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        _sync(path.parent)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unwritable(path: Path, error: Exception) -> StoreError:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return StoreError(f"{path} cannot be written: {text}; free space or mend its permissions, nothing was changed")


def _checksum(flat: dict[str, Tensor], metadata: dict[str, str]) -> str:
    total = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(flat):
        leaf = flat[name]
        total.update(f"\0{name}\0{leaf.dtype}\0{list(leaf.shape)}\0".encode())
        total.update(leaf.reshape(-1).view(torch.uint8).numpy().data if leaf.numel() else b"")
    return total.hexdigest()
