"""Gives every tensor of a state the shape that it has on any mesh.

E experts, F expert width, D hidden. Expert tensor parallelism keeps ``gate_up_proj`` as [E, 2, F, D], because a slice
of F then contains the gate and the up half. Everywhere else, and in a checkpoint, it is [E, 2F, D].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

_STACKED = "gate_up_proj"


@dataclass(frozen=True, eq=False)
class Boxes:
    """A rank's part of a tensor, as several boxes. Implements the protocol by which DCP reads and writes a DTensor."""

    shape: torch.Size
    dtype: torch.dtype
    #: offsets of each box -> view of its values
    views: dict[tuple[int, ...], Tensor]

    def size(self) -> torch.Size:
        """Return the shape of the whole tensor."""
        return self.shape

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(at), view.shape) for at, view in self.views.items()]

    def __create_write_items__(self, name: str, _value: object) -> list[WriteItem]:
        properties = TensorProperties(self.dtype)
        items = []
        for chunk in self.__create_chunk_list__():
            data = TensorWriteData(chunk, properties, self.shape)
            items.append(WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
        return items

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.views[tuple(index.offset or ())]


def logical(name: str, value: Tensor) -> Tensor | Boxes:
    """Return ``value`` with its shape on any mesh. The result shares its memory."""
    if not isinstance(value, DTensor) or value.dim() != 4 or _STACKED not in name:
        return value
    experts, halves, width, hidden = value.shape
    local = value.to_local()
    views: dict[tuple[int, ...], Tensor] = {}
    for chunk in value.__create_chunk_list__():
        expert, half, row, column = chunk.offsets
        for i in range(local.shape[1] if local.numel() else 0):
            views[expert, (half + i) * width + row, column] = local[:, i]
    return Boxes(torch.Size((experts, halves * width, hidden)), value.dtype, views)


def view_of(value: Tensor | Boxes, index: MetadataIndex) -> Tensor:
    """Return the part of this rank's ``value`` that ``index`` names."""
    if isinstance(value, Boxes):
        return value.__get_tensor_shard__(index)
    return value.to_local() if isinstance(value, DTensor) else value
