"""Reads checkpoints of schema 1, which contain pickles (torch's distributed format), without unpickling them.

Such a checkpoint has ``.metadata``, a pickle that describes the tensors, and ``.distcp`` files. These contain zip
archives, one per chunk, each with a small pickle and the values. :func:`interpret` follows the opcodes of a pickle and
builds inert values: it imports nothing and calls nothing. It refuses everything that torch does not write.

Equimoe 0.1 wrote this format. Version 0.3 will remove this file, and schema 1 from ``manifest.py`` and ``store.py``. A
run started with 0.1 must have saved a checkpoint with 0.2 by then.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .manifest import METADATA, REMEDY, CheckpointError, reason, short
from .tensors import DTYPE_OF_NAME, Chunk, Saved

_MAX_METADATA_BYTES = 32 << 20
_MAX_TENSOR_PICKLE_BYTES = 4096

#: raised by zipfile for bytes that are not an archive of ours, and by :func:`interpret` for their pickle
_BROKEN_ARCHIVE = (
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


@dataclass(frozen=True)
class Name:
    """A global name in a pickle. It is never imported."""

    module: str
    name: str


@dataclass(eq=False, repr=False)
class Record:
    """Stands for the object that unpickling would create by calling ``of``."""

    of: Name
    arguments: tuple[Any, ...]
    state: Any = None


#: stands for the storage that a tensor's pickle refers to
_STORAGE = Name("", "storage")
#: the names that may appear in the pickle of ``.metadata``, and in that of a tensor
_METADATA_NAMES = {
    *(Name(_DCP, name) for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata")),
    *(Name(_DCP, name) for name in ("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    Name("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    Name("torch.serialization", "_get_layout"),
    Name("torch", "Size"),
    *(Name(module, "PosixPath") for module in ("pathlib", "pathlib._local")),
    *(Name("torch", name) for name in DTYPE_OF_NAME),
}
_TENSOR_NAMES = {
    Name("torch._utils", "_rebuild_tensor_v2"),
    Name("collections", "OrderedDict"),
    _STORAGE,
    *(Name("torch", name) for name in _STORAGES),
}


def contents(path: Path, manifest: dict[str, Any]) -> dict[str, Saved]:
    """Return the description of all tensors of the checkpoint in folder ``path``."""
    file = path / METADATA
    if METADATA not in manifest["files"]:
        raise CheckpointError(f"{file}: missing from the manifest; {REMEDY}")
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items() if name != METADATA}
    try:
        if file.stat().st_size > _MAX_METADATA_BYTES:
            raise ValueError(f"larger than {_MAX_METADATA_BYTES} bytes")
        fields = _fields(interpret(file.read_bytes(), _METADATA_NAMES), "Metadata")
        places = _places(_typed(fields["storage_data"], dict), sizes)
        found = {}
        for name, entry in _typed(fields["state_dict_metadata"], dict).items():
            found[_typed(name, str)] = saved = _saved(name, entry, places)
            saved.check()
    except (OSError, ValueError, KeyError, IndexError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{file}: refused: {reason(error)}") from None
    return found


@contextmanager
def opened(file: Path) -> Iterator[Callable[[Chunk, tuple[slice, ...]], Tensor]]:
    """See :data:`equimoe.moe.checkpoint.tensors.Opened`."""
    with file.open("rb") as stream:

        def read(chunk: Chunk, box: tuple[slice, ...]) -> Tensor:
            try:
                return _read_chunk(stream, chunk)[box]
            except _BROKEN_ARCHIVE as error:
                raise CheckpointError(f"{file}: refused: {reason(error)}") from None

        yield read


def interpret(pickled: bytes, names: set[Name]) -> Any:
    """Return the value of a pickle as inert data. Imports and calls nothing.

    The data are tuples, lists, dicts, strings, numbers, :class:`Name` and :class:`Record`. Raises ValueError for an
    opcode that torch's files do not have, or a name that is not in ``names``.
    """
    machine = _Machine(names)
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "STOP":
            value = machine.pop()
            if machine.stack:
                raise ValueError("the pickle leaves more than one value")
            return value
        machine.do(opcode.name, argument)
    raise ValueError("the pickle has no end")


class _Machine:
    """Interprets the opcodes of a pickle with a stack and a memo of inert values."""

    MARK = object()

    def __init__(self, names: set[Name]) -> None:
        self.names = names
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def do(self, opcode: str, argument: Any) -> None:
        push, pop = self.stack.append, self.pop
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "SHORT_BINUNICODE" | "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                push(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                push({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "MARK":
                push(self.MARK)
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.top(object)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.top(object)
            case "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [pop() for _ in range(int(opcode[-1]) if opcode[-1].isdigit() else 0)]
                push(tuple(reversed(items)))
            case "TUPLE":
                push(tuple(self.pop_to_mark()))
            case "EMPTY_LIST":
                push([])
            case "APPEND" | "APPENDS":
                values = self.pop_to_mark() if opcode == "APPENDS" else [pop()]
                self.top(list).extend(values)
            case "EMPTY_DICT":
                push({})
            case "SETITEM" | "SETITEMS":
                values = self.pop_to_mark() if opcode == "SETITEMS" else [pop(), pop()][::-1]
                self.update(self.top(dict), values[::2], values[1::2])
            case "GLOBAL":
                push(self.known(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = pop(), pop()
                push(self.known(module, name))
            case "REDUCE" | "NEWOBJ":
                arguments = _typed(pop(), tuple)
                push(Record(_typed(pop(), Name), arguments))
            case "BUILD":
                state = pop()
                self.build(self.top(Record), state)
            case "BINPERSID":
                push(Record(self.known(_STORAGE.module, _STORAGE.name), _typed(pop(), tuple)))
            case _:
                raise ValueError(f"the pickle has the opcode {opcode}, which our checkpoints do not use")

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is self.MARK:
            raise ValueError("the pickle's stack is empty")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        items = []
        while self.stack and self.stack[-1] is not self.MARK:
            items.append(self.stack.pop())
        if not self.stack:
            raise ValueError("the pickle has no mark")
        self.stack.pop()
        return items[::-1]

    def top(self, kind: type) -> Any:
        self.stack.append(self.pop())
        return _typed(self.stack[-1], kind)

    def known(self, module: Any, name: Any) -> Name:
        found = Name(_typed(module, str), _typed(name, str))
        if found not in self.names:
            raise ValueError(f"the pickle names {found.module}.{found.name}, which our checkpoints do not use")
        return found

    @staticmethod
    def update(into: dict[Any, Any], keys: list[Any], values: list[Any]) -> None:
        for key, value in zip(keys, values, strict=True):
            if not isinstance(key, (str, Record)) or key in into:
                raise ValueError("the pickle has a key that is repeated, or is neither a string nor a record")
            into[key] = value

    @staticmethod
    def build(record: Record, state: Any) -> None:
        if record.state is not None:
            raise ValueError("the pickle sets the state of a record twice")
        record.state = state


def _places(storage: dict[Any, Any], sizes: dict[str, int]) -> dict[tuple[str, tuple[int, ...]], Chunk]:
    """Return the chunks by (tensor name, offsets). ``sizes`` are the bytes of each file."""
    found = {}
    for index, info in storage.items():
        where, place = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
        file, first, length = _typed(place["relative_path"], str), _size(place["offset"]), _size(place["length"])
        if place.keys() != {"relative_path", "offset", "length"}:
            raise ValueError("a chunk is stored in a way that our checkpoints do not use")
        if file not in sizes or first + length > sizes[file]:
            raise ValueError(f"a chunk is outside the files of the manifest: {short(file)}")
        key = _typed(where["fqn"], str), _torch_size(where["offset"])
        if key in found:
            raise ValueError(f"{short(key[0])}: chunks overlap")
        found[key] = Chunk(key[1], (), file, (first, length))
    return found


def _saved(name: str, entry: Any, places: dict[tuple[str, tuple[int, ...]], Chunk]) -> Saved:
    fields = _fields(entry, "TensorStorageMetadata")
    dtype = _typed(_state(fields["properties"], "TensorProperties", tuple)[0], Name)
    chunks = []
    for record in _typed(fields["chunks"], list):
        box = _fields(record, "ChunkStorageMetadata")
        place = places[name, _torch_size(box["offsets"])]
        chunks.append(replace(place, sizes=_torch_size(box["sizes"])))
    return Saved(DTYPE_OF_NAME[dtype.name], _torch_size(fields["size"]), tuple(chunks))


def _read_chunk(stream: BinaryIO, chunk: Chunk) -> Tensor:
    """Read a chunk's tensor from its zip archive."""
    first, length = _typed(chunk.place, tuple)
    stream.seek(first)
    with zipfile.ZipFile(io.BytesIO(stream.read(length))) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise ValueError("two entries of the archive have the same name")
        for entry in entries.values():
            if entry.compress_type != zipfile.ZIP_STORED or not entry.file_size == entry.compress_size <= length:
                raise ValueError("the archive is not one that torch writes")
        if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
            raise ValueError("the tensor is not little-endian")
        if entries["data.pkl"].file_size > _MAX_TENSOR_PICKLE_BYTES:
            raise ValueError("the tensor's description is too large")
        rebuild = interpret(archive.read(entries["data.pkl"]), _TENSOR_NAMES)
        arguments = _made(rebuild, "_rebuild_tensor_v2").arguments
        storage, offset, sizes, strides = arguments[:4]
        _, kind, key, _, count = _made(storage, _STORAGE.name).arguments
        dtype = _STORAGES[_typed(kind, Name).name]
        data = bytearray(archive.read(entries[f"data/{_typed(key, str)}"]))
    sizes, strides = (tuple(map(_size, _typed(part, tuple))) for part in (sizes, strides))
    if len(data) != _size(count) * dtype.itemsize or sizes != chunk.sizes or len(sizes) != len(strides):
        raise ValueError(f"the tensor does not have the shape {short(chunk.sizes)}")
    last = _size(offset) + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if math.prod(sizes) == 0 or last >= count:
        raise ValueError("the tensor is larger than its storage")
    return torch.as_strided(torch.frombuffer(data, dtype=dtype), sizes, strides, offset)


def _made(value: Any, name: str) -> Record:
    record: Record = _typed(value, Record)
    if record.of.name != name:
        raise ValueError(f"found a {record.of.name} instead of a {name}")
    return record


def _state(value: Any, name: str, kind: type) -> Any:
    return _typed(_made(value, name).state, kind)


def _fields(value: Any, name: str) -> dict[Any, Any]:
    fields: dict[Any, Any] = _state(value, name, dict)
    return fields


def _torch_size(value: Any) -> tuple[int, ...]:
    (sizes,) = _made(value, "Size").arguments
    return tuple(map(_size, _typed(sizes, tuple)))


def _size(value: Any) -> int:
    size: int = _typed(value, int)
    if not 0 <= size < 2**63:
        raise ValueError(f"{short(size)} is not a size")
    return size


def _typed(value: Any, kind: type) -> Any:
    """Return ``value`` if it is a ``kind``, else raise ValueError. A bool is not an int."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"found a {type(value).__name__} instead of a {kind.__name__}")
    return value
