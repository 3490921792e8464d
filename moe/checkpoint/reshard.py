"""Reads sharded tensors with torch's distributed checkpoint (DCP), and with a storage class of our own.

DCP plans which rank reads which box of which tensor, and so reshards between any two meshes. Its own storage uses
pickle; :class:`ShardReader` implements DCP's public storage interface without pickle.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from .logical import Boxes, view_of
from .manifest import CheckpointError
from .ranks import distributed
from .tensors import Chunk, Opened, Saved


def fill(folder: Path, state: dict[str, Tensor | Boxes], tensors: dict[str, Saved], opened: Opened) -> None:
    """Fill the tensors of ``state`` in place from the checkpoint in ``folder``, whose files ``opened`` opens."""
    reader = ShardReader(folder, {name: tensors[name] for name in state}, opened)
    with _single_process_allowed(), _one_line(f"{folder}: refused"):
        dcp.load(
            cast(dict[str, Any], state), storage_reader=reader, planner=LogicalPlanner(), no_dist=not distributed()
        )


class LogicalPlanner(DefaultLoadPlanner):
    """Lets DCP fill tensors and :class:`~equimoe.moe.checkpoint.logical.Boxes`."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return view_of(self.state_dict[index.fqn], index)


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
