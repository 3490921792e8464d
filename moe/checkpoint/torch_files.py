"""Reads files of tensors that torch has written, which contain pickles, without unpickling them.

``torch.save`` writes a zip archive with a pickle and the values. A distributed checkpoint has ``.metadata``, a pickle
that describes the tensors, and ``.distcp`` files of such archives, one per chunk. :func:`interpret` reads the pickles.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .manifest import CheckpointError, reason, short
from .pickles import ORDERED, STORAGE, Name, fields, interpret, made, size, state, torch_size, typed
from .tensors import DTYPE_OF_NAME, Chunk, Saved

_MAX_TENSOR_PICKLE_BYTES = 4096

#: raised by zipfile for bytes that are not an archive of ours, and by :func:`interpret` for their pickle
BROKEN = (
    zipfile.BadZipFile,
    struct.error,
    EOFError,
    LookupError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)

_DCP = "torch.distributed.checkpoint.metadata"
_STORAGES = {
    f"{kind}Storage": dtype
    for kind, dtype in {
        **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16},
        **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
        **{"Bool": torch.bool},
    }.items()
}

#: the names that may appear in the pickle of ``.metadata``, and in that of a tensor
METADATA_NAMES = {
    *(Name(_DCP, name) for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata")),
    *(Name(_DCP, name) for name in ("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    Name("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    Name("torch.serialization", "_get_layout"),
    Name("torch", "Size"),
    *(Name(module, "PosixPath") for module in ("pathlib", "pathlib._local")),
    *(Name("torch", name) for name in DTYPE_OF_NAME),
}
TENSOR_NAMES = {
    Name("torch._utils", "_rebuild_tensor_v2"),
    ORDERED,
    STORAGE,
    *(Name("torch", name) for name in _STORAGES),
}


@contextmanager
def opened(file: Path) -> Iterator[Callable[[Chunk, tuple[slice, ...]], Tensor]]:
    """See :data:`equimoe.moe.checkpoint.tensors.Opened`."""
    with file.open("rb") as stream:

        def read(chunk: Chunk, box: tuple[slice, ...]) -> Tensor:
            try:
                return _read_chunk(stream, chunk)[box]
            except BROKEN as error:
                raise CheckpointError(f"{file}: refused: {reason(error)}") from None

        yield read


def described(
    pickled: bytes, names: set[Name], sizes: dict[str, int], wanted: Callable[[str], bool]
) -> dict[str, Saved]:
    """Return the description of the ``wanted`` tensors in the pickle of ``.metadata``.

    ``names`` are those that it may contain. ``sizes`` are the bytes of each file. Raises ValueError, or an error of
    :data:`BROKEN`.
    """
    content = fields(interpret(pickled, names), "Metadata")
    tensors = {
        name: entry for name, entry in typed(content["state_dict_metadata"], dict).items() if wanted(typed(name, str))
    }
    places = _places(typed(content["storage_data"], dict), sizes, tensors.keys())
    found = {}
    for name, entry in tensors.items():
        found[name] = saved = _saved(name, entry, places)
        saved.check()
        if math.prod(saved.shape) * saved.dtype.itemsize > sum(sizes.values()):
            raise ValueError(f"{short(name)}: the shape {short(saved.shape)} is larger than all files")
    return found


def _places(
    storage: dict[Any, Any], sizes: dict[str, int], wanted: Collection[str]
) -> dict[tuple[str, tuple[int, ...]], Chunk]:
    """Return the chunks of the ``wanted`` tensors by (tensor name, offsets)."""
    found = {}
    for index, info in storage.items():
        where, place = fields(index, "MetadataIndex"), fields(info, "_StorageInfo")
        if typed(where["fqn"], str) not in wanted:
            continue
        file, first, length = typed(place["relative_path"], str), size(place["offset"]), size(place["length"])
        if place.keys() != {"relative_path", "offset", "length"}:
            raise ValueError("a chunk is stored in a way that our checkpoints do not use")
        if file not in sizes or first + length > sizes[file]:
            raise ValueError(f"a chunk is outside the files of the checkpoint: {short(file)}")
        key = typed(where["fqn"], str), torch_size(where["offset"])
        if key in found:
            raise ValueError(f"{short(key[0])}: chunks overlap")
        found[key] = Chunk(key[1], (), file, (first, length))
    return found


def _saved(name: str, entry: Any, places: dict[tuple[str, tuple[int, ...]], Chunk]) -> Saved:
    of_entry = fields(entry, "TensorStorageMetadata")
    dtype = typed(state(of_entry["properties"], "TensorProperties", tuple)[0], Name)
    chunks = []
    for record in typed(of_entry["chunks"], list):
        box = fields(record, "ChunkStorageMetadata")
        place = places[name, torch_size(box["offsets"])]
        chunks.append(replace(place, sizes=torch_size(box["sizes"])))
    return Saved(DTYPE_OF_NAME[dtype.name], torch_size(of_entry["size"]), tuple(chunks))


def _read_chunk(stream: BinaryIO, chunk: Chunk) -> Tensor:
    """Read a chunk's tensor from its zip archive."""
    first, length = typed(chunk.place, tuple)
    stream.seek(first)
    with Archive(io.BytesIO(stream.read(length)), _MAX_TENSOR_PICKLE_BYTES) as archive:
        return archive.tensor(archive.interpret(TENSOR_NAMES), chunk.sizes)


class Archive:
    """A zip archive that ``torch.save`` has written. A context manager, which keeps it open."""

    def __init__(self, stream: BinaryIO, most_pickled: int) -> None:
        """``most_pickled``: the largest size of its pickle."""
        self._zip = zipfile.ZipFile(stream)
        length = stream.seek(0, io.SEEK_END)
        self._entries = {entry.filename.partition("/")[2]: entry for entry in self._zip.infolist()}
        if len(self._entries) != len(self._zip.infolist()):
            raise ValueError("two entries of the archive have the same name")
        for entry in self._entries.values():
            if entry.compress_type != zipfile.ZIP_STORED or not entry.file_size == entry.compress_size <= length:
                raise ValueError("the archive is not one that torch writes")
        if "byteorder" in self._entries and self._read("byteorder") != b"little":
            raise ValueError("the tensor is not little-endian")
        if self._entries["data.pkl"].file_size > most_pickled:
            raise ValueError("the tensor's description is too large")

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_error: object) -> None:
        self._zip.close()

    def interpret(self, names: set[Name]) -> Any:
        """Return the content as inert data; see :func:`interpret`."""
        return interpret(self._read("data.pkl"), names)

    def tensor(self, rebuild: Any, shape: tuple[int, ...] | None = None) -> Tensor:
        """Read the tensor that a record of the content stands for. It must have the ``shape``, if given."""
        storage, offset, sizes, strides = made(rebuild, "_rebuild_tensor_v2").arguments[:4]
        _, kind, key, _, count = made(storage, STORAGE.name).arguments
        dtype = _STORAGES[typed(kind, Name).name]
        data = bytearray(self._read(f"data/{typed(key, str)}"))
        sizes, strides = (tuple(map(size, typed(part, tuple))) for part in (sizes, strides))
        shape = sizes if shape is None else shape
        if len(data) != size(count) * dtype.itemsize or sizes != shape or len(sizes) != len(strides):
            raise ValueError(f"the tensor does not have the shape {short(shape)}")
        last = size(offset) + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
        if math.prod(sizes) == 0 or last >= count or math.prod(sizes) > count:  # a stride of 0 repeats numbers
            raise ValueError("the tensor is larger than its storage")
        return torch.as_strided(torch.frombuffer(data, dtype=dtype), sizes, strides, offset)

    def _read(self, entry: str) -> bytes:
        return self._zip.read(self._entries[entry])
