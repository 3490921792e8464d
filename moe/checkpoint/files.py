"""Writes files so that they survive a loss of power, and removes what earlier saves left."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .tensors import DTYPES

#: bytes that are written and hashed at a time
_BLOCK = 4 << 20


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write CPU tensors as a new safetensors file, and flush it to disk. Return its size and sha256.

    The library would copy each tensor first, and would hold the interpreter's lock while it writes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # so that every tensor is aligned
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return write_durably(file, [struct.pack("<Q", len(text)), text, *(_bytes_of(tensors[name]) for name in names)])


def write_durably(file: Path, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a new file, and flush it and its folder's entry to disk. Return its size and sha256."""
    digest, size = hashlib.sha256(), 0
    with open(file, "xb", buffering=0) as stream:
        for part in parts:
            for first in range(0, len(part), _BLOCK):
                block = memoryview(part)[first : first + _BLOCK]
                digest.update(block)
                size += len(block)
                while block:
                    block = block[stream.write(block) or 0 :]
        os.fsync(stream.fileno())
    sync(file.parent)
    return {"bytes": size, "sha256": digest.hexdigest()}


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk, so that it survives a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete an entry of a folder, if it exists. If it is a symbolic link, delete only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def free_bytes(folder: Path) -> int | None:
    """Return the free space of the file system of ``folder``, or of its nearest parent; None if it is unknown."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize if found.f_blocks else None  # some network file systems report nothing


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
