"""Writes sharded tensors with torch's distributed checkpoint (DCP), while training goes on.

DCP plans which rank writes which box of which tensor, runs the save in a thread, and tells every rank how it ended.
:class:`Stager`, :class:`StagedPlanner` and :class:`ShardWriter` implement its public interfaces: the first copies what
this rank will write, so that the optimizer may go on at once; the last writes safetensors files, without pickle.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from . import ranks
from .files import free_bytes, remove, write_tensors
from .logical import Boxes, State, view_of
from .manifest import printable
from .reader import key_of
from .tensors import Chunk, Saved

#: a rank starts a new file beyond this size
FILE_BYTES = 1 << 30
#: free space that a save must find, relative to the bytes that it will write
SPARE = 1.2
#: how long ranks wait for each other's files
_PATIENCE = timedelta(hours=1)

#: the only key of what DCP is given as a state, because it logs each key, which takes longer than planning
STATE = "state"


class NonFiniteStateError(ValueError):
    """Raised if a tensor contains NaN or infinity. The state was not saved."""


class SaveError(RuntimeError):
    """Raised if a checkpoint could not be written. Older checkpoints are unchanged."""


class LostFolderError(SaveError):
    """Raised if the folder of the checkpoints is not this run's any more. Nothing is written or deleted there."""


class Stager(AsyncStager):
    """Copies the boxes that this rank will write. Keeps the plan and the buffers for the next save."""

    _synchronize_after_execute = False

    def __init__(self, group: ranks.Group) -> None:
        self.group = group
        self.plan = SavePlan([])
        self._signature: object = None
        self._buffers: dict[MetadataIndex, Tensor] = {}

    def stage(self, state_dict: Any) -> Any:
        """Return the copies by index. Every rank must call this."""
        state: State = state_dict[STATE]
        signature = {name: _signature(value) for name, value in state.items()}
        if not all(ranks.gather(signature == self._signature, self.group)):
            self.plan, self._signature, self._buffers = self._planned(state), signature, {}
        cuda = False
        for item in self.plan.items:
            source = view_of(state[item.index.fqn], item.index).detach()
            cuda |= source.is_cuda
            if item.index not in self._buffers:
                self._buffers[item.index] = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._buffers[item.index].copy_(source, non_blocking=True)
        if cuda:
            torch.cuda.current_stream().synchronize()
        return {STATE: self._buffers}

    def synchronize_staging(self) -> None:
        """Do nothing: :meth:`stage` has waited for the copies."""
        return None

    def close(self) -> None:
        """Do nothing: the buffers are freed with this object."""
        return None

    def _planned(self, state: State) -> SavePlan:
        """Let DCP choose which rank writes what. Every box is written once, and ranks write about equally much."""
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(cast(Any, state), is_coordinator=ranks.rank() == 0)
        plan = planner.create_local_plan()
        return cast(SavePlan, ranks.divide(plan, lambda plans: planner.create_global_plan(plans)[0], self.group))


class StagedPlanner(DefaultSavePlanner):
    """Gives DCP the plan and the copies of a :class:`Stager`."""

    def __init__(self, stager: Stager) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._stager = stager
        self._copies: dict[MetadataIndex, Tensor] = {}

    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        self._copies, self.is_coordinator = state_dict[STATE], is_coordinator
        _give_way()

    def create_local_plan(self) -> SavePlan:
        self.plan = self._stager.plan
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._copies[write_item.index]


class ShardWriter(StorageWriter):
    """Writes each rank's boxes to safetensors files ``rank00000-000.safetensors``, ..."""

    def __init__(
        self,
        folder: Path,
        commit: Callable[[dict[str, Saved], dict[str, dict[str, Any]]], None],
        guard: Callable[[], str],
    ) -> None:
        self.folder = folder
        #: says on rank 0 why nothing may be written or deleted in the folder around this one; empty if it may
        self.guard = guard
        #: bytes of all ranks; 0 until they are known
        self.total = 0
        self._commit = commit

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the folder. DCP calls this on rank 0 before any rank writes."""
        if why := self.guard():
            raise LostFolderError(why)
        total = sum(_bytes_of(item) for plan in plans for item in plan.items)
        free = free_bytes(self.folder)
        self.total = total
        if free is not None and free < SPARE * total:
            raise OSError(errno.ENOSPC, f"less than {SPARE} times its size is free")
        remove(self.folder)
        self.folder.mkdir(parents=True)
        return [dataclasses.replace(plan, storage_data=(f"rank{n:05d}", total)) for n, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        prefix, self.total = plan.storage_data
        results = []
        for item in plan.items:
            _check_finite(item.index.fqn, cast(Tensor, planner.resolve_data(item)))
        for number, items in enumerate(_files_of(plan.items)):
            name, tensors = f"{prefix}-{number:03d}.safetensors", {}
            for item in items:
                offsets, sizes, shape = _box(item)
                tensors[key_of(item.index.fqn, offsets, sizes == shape)] = cast(Tensor, planner.resolve_data(item))
            assert len(tensors) == len(items)
            entry = write_tensors(self.folder / name, tensors)
            results += [WriteResult(item.index, _bytes_of(item), (name, entry, *_box(item)[:2])) for item in items]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Describe all tensors and complete the checkpoint. DCP calls this on rank 0, after all ranks have written."""
        chunks: dict[str, list[Chunk]] = {name: [] for name in metadata.state_dict_metadata}
        files: dict[str, dict[str, Any]] = {}
        for result in (result for of_rank in results for result in of_rank):
            name, (file, files[file], offsets, sizes) = result.index.fqn, result.storage_data
            key = key_of(name, offsets, sizes == tuple(_tensor(metadata, name).size))
            chunks[name].append(Chunk(offsets, sizes, file, key))
        tensors = {}
        for name in chunks:
            entry = _tensor(metadata, name)
            tensors[name] = Saved(entry.properties.dtype, tuple(entry.size), tuple(chunks[name]))
            tensors[name].check()
        self._commit(tensors, files)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def background_group() -> ranks.Group:
    """Return a new group for the collectives of a save, which must not mix with those of training."""
    return dist.new_group(backend="gloo", timeout=_PATIENCE) if ranks.distributed() else None


def _give_way() -> None:
    """Lower the priority of this thread, so that a save uses the time in which training waits.

    DCP starts a new thread for every save. Elsewhere than on Linux, a thread has no priority of its own.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + 10)


def _signature(value: Tensor | Boxes) -> object:
    """Return what the plan depends on."""
    if isinstance(value, Boxes):
        return value.shape, value.dtype, tuple(value.views)
    return value.shape, value.dtype


def _check_finite(name: str, value: Tensor) -> None:
    if not value.is_floating_point() or not value.numel():
        return
    wide = value.float() if value.itemsize == 1 else value  # fp8 cannot be compared
    if not all(math.isfinite(bound.item()) for bound in wide.aminmax()):  # in one pass, without a temporary
        raise NonFiniteStateError(f"{printable(name)}: is not finite")


def _files_of(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    """Group items into files of at most ``FILE_BYTES``. A larger item gets its own file; empty ones are left out."""
    group: list[WriteItem] = []
    size = 0
    for item in items:
        nbytes = _bytes_of(item)
        if nbytes == 0:
            continue
        if group and size + nbytes > FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(item)
        size += nbytes
    if group:
        yield group


def _bytes_of(item: WriteItem) -> int:
    assert item.tensor_data is not None, "a state holds only tensors"
    return torch.Size(_box(item)[1]).numel() * item.tensor_data.properties.dtype.itemsize


def _box(item: WriteItem) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the offsets and sizes of a chunk, and the shape of its tensor."""
    data = item.tensor_data
    assert data is not None and data.chunk is not None
    return tuple(data.chunk.offsets), tuple(data.chunk.sizes), tuple(data.size)


def _tensor(metadata: Metadata, name: str) -> TensorStorageMetadata:
    return cast(TensorStorageMetadata, metadata.state_dict_metadata[name])
