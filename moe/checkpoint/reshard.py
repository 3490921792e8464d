"""Writes and reads sharded tensors with torch's distributed checkpoint (DCP), and with storage classes of our own.

DCP plans which rank writes or reads which box of which tensor, and so reshards between any two meshes. Its own storage
uses pickle; :class:`ShardWriter` and :class:`ShardReader` implement DCP's public storage interface without pickle.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from .manifest import CheckpointError
from .reader import key_of
from .tensors import Chunk, Opened, Saved

#: a rank starts a new file beyond this size, because all tensors of a file are copied to host memory at once
FILE_BYTES = 1 << 30


def write(folder: Path, state: dict[str, Tensor]) -> dict[str, Saved]:
    """Write every rank's part of ``state`` to ``folder``, and flush it to disk.

    Returns the description of all tensors on rank 0, and an empty dict elsewhere.
    """
    writer = ShardWriter(folder)
    with _single_process_allowed(), _one_line(f"{folder}: cannot be written"):
        dcp.save(cast(dict[str, Any], state), storage_writer=writer, no_dist=not distributed())
    return writer.tensors


def fill(folder: Path, state: dict[str, Tensor], tensors: dict[str, Saved], opened: Opened) -> None:
    """Fill the tensors of ``state`` in place from the checkpoint in ``folder``, whose files ``opened`` opens."""
    reader = ShardReader(folder, {name: tensors[name] for name in state}, opened)
    with _single_process_allowed(), _one_line(f"{folder}: refused"):
        dcp.load(cast(dict[str, Any], state), storage_reader=reader, no_dist=not distributed())


class ShardWriter(StorageWriter):
    """Writes each rank's chunks to safetensors files ``rank00000-000.safetensors``, ..."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, Saved] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [dataclasses.replace(plan, storage_data=f"rank{rank:05d}") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        for number, items in enumerate(_files_of(plan.items)):
            name = f"{plan.storage_data}-{number:03d}.safetensors"
            tensors = {}
            for item in items:
                offsets, sizes, shape = _box(item)
                # always copy: safetensors refuses tensors that share memory
                source = cast(Tensor, planner.resolve_data(item)).detach()
                copy = source.to("cpu", copy=True, memory_format=torch.contiguous_format)
                tensors[key_of(item.index.fqn, offsets, sizes == shape)] = copy
                results.append(WriteResult(item.index, copy.nbytes, (name, offsets, sizes)))
            assert len(tensors) == len(items)
            save_file(tensors, self.folder / name, metadata={"format": "pt"})
            sync(self.folder / name)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Collect the description of all tensors. DCP calls this on rank 0, after all ranks have written."""
        chunks: dict[str, list[Chunk]] = {name: [] for name in metadata.state_dict_metadata}
        for result in (result for of_rank in results for result in of_rank):
            name, (file, offsets, sizes) = result.index.fqn, result.storage_data
            key = key_of(name, offsets, sizes == tuple(_tensor(metadata, name).size))
            chunks[name].append(Chunk(offsets, sizes, file, key))
        for name in chunks:
            entry = _tensor(metadata, name)
            self.tensors[name] = Saved(entry.properties.dtype, tuple(entry.size), tuple(chunks[name]))
            self.tensors[name].check()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class ShardReader(StorageReader):
    """Reads boxes of ``tensors`` from files that ``opened`` opens."""

    def __init__(self, folder: Path, tensors: dict[str, Saved], opened: Opened) -> None:
        self.folder, self.tensors, self.opened = folder, tensors, opened

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self) -> Metadata:
        return Metadata({name: _described(saved) for name, saved in self.tensors.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        chunks = {(name, chunk.offsets): chunk for name, saved in self.tensors.items() for chunk in _full(saved)}
        by_file: dict[str, list[tuple[ReadItem, Chunk]]] = {}
        for item in plan.items:
            assert item.type == LoadItemType.TENSOR, "bytes would be unpickled"
            chunk = chunks[item.storage_index.fqn, tuple(item.storage_index.offset or ())]
            by_file.setdefault(chunk.file, []).append((item, chunk))
        for file, items in by_file.items():
            with self.opened(self.folder / file) as read:
                for item, chunk in items:
                    box = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(read(chunk, box))
                    planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def distributed() -> bool:
    """Return whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk, so that it survives a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _files_of(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    """Group items into files of at most ``FILE_BYTES``. A larger item gets its own file; empty ones are left out."""
    group: list[WriteItem] = []
    size = 0
    for item in items:
        assert item.tensor_data is not None, "a state holds only tensors"
        nbytes = torch.Size(_box(item)[1]).numel() * item.tensor_data.properties.dtype.itemsize
        if nbytes == 0:
            continue
        if group and size + nbytes > FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(item)
        size += nbytes
    if group:
        yield group


def _box(item: WriteItem) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the offsets and sizes of a chunk, and the shape of its tensor."""
    data = item.tensor_data
    assert data is not None and data.chunk is not None
    return tuple(data.chunk.offsets), tuple(data.chunk.sizes), tuple(data.size)


def _tensor(metadata: Metadata, name: str) -> TensorStorageMetadata:
    return cast(TensorStorageMetadata, metadata.state_dict_metadata[name])


def _full(saved: Saved) -> list[Chunk]:
    return [chunk for chunk in saved.chunks if all(chunk.sizes)]


def _described(saved: Saved) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in _full(saved)]
    return TensorStorageMetadata(TensorProperties(saved.dtype), torch.Size(saved.shape), chunks)


@contextmanager
def _single_process_allowed() -> Iterator[None]:
    """Context that silences DCP's warnings about a missing process group, which a run of one process does not need."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        warnings.filterwarnings("ignore", message="torch.distributed is unavailable")
        yield


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Context that replaces DCP's error, a page with all ranks' tracebacks, by one line for the lowest failed rank."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        why = (str(cause) or type(cause).__name__).splitlines()[0]
        where = "" if isinstance(cause, CheckpointError) else f"{what}: "
        raise CheckpointError(f"{where}rank {rank}: {why[:400]}") from None
