"""Writes files so that they survive a loss of power, and removes what earlier saves left."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_blocks(file, entries, lambda name: [tensors[name]])


def write_blocks(
    file: Path,
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    blocks: Callable[[str], Iterable[Tensor]],
) -> dict[str, Any]:
    """Write a safetensors file like :func:`write_tensors`, without holding its tensors in memory.

    ``entries`` gives the dtype and shape of each tensor, and ``blocks`` its values: tensors that follow each other.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names = sorted(entries, key=lambda name: (-entries[name][0].itemsize, name))  # so that every tensor is aligned
    end, sizes = 0, {}
    for name in names:
        dtype, shape = entries[name]
        sizes[name] = math.prod(shape) * dtype.itemsize
        begin, end = end, end + sizes[name]
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[bytes | memoryview]:
        yield struct.pack("<Q", len(text))
        yield text
        for name in names:
            written = 0
            for block in blocks(name):
                assert block.dtype == entries[name][0]
                written += block.nbytes
                yield _bytes_of(block)
            assert written == sizes[name], f"{name}: {written} bytes of {sizes[name]}"

    return write_durably(file, parts())


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


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes ``out`` at the end of the block. After an error, nothing is left of it.

    Nothing that was there before is touched. Raises ValueError if ``out`` exists.
    """
    if os.path.lexists(out):
        raise ValueError(f"--out={out}: exists already; choose another folder")
    partial = out.with_name(f"{out.name}.{secrets.token_hex(4)}.tmp")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
        sync(out.absolute().parent)
    except BaseException:
        remove(partial)
        raise


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
