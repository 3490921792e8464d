"""Gives every tensor of a state the shape that it has on any mesh.

E experts, F expert width, D hidden. Expert tensor parallelism keeps ``gate_up_proj`` as [E, 2, F, D], because a slice
of F then contains the gate and the up half. Everywhere else, and in a checkpoint, it is [E, 2F, D].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

_STACKED = "gate_up_proj"


@dataclass(frozen=True, eq=False)
class Boxes:
    """A rank's part of a tensor, as several boxes. Implements the protocol by which DCP plans DTensors."""

    shape: torch.Size
    dtype: torch.dtype
    #: offsets of each box -> view of its values
    views: dict[tuple[int, ...], Tensor]
    #: the tensor that holds the parts
    of: Tensor

    def size(self) -> torch.Size:
        """Return the shape of the whole tensor."""
        return self.shape

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(at), view.shape) for at, view in self.views.items() if view.numel()]

    def __create_write_items__(self, name: str, _value: object) -> list[WriteItem]:
        properties = TensorProperties(self.dtype)
        items = []
        for chunk in self.__create_chunk_list__():
            data = TensorWriteData(chunk, properties, self.shape)
            items.append(WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
        return items


#: tensors by logical names
State = Mapping[str, Tensor | Boxes]


def tensors_of(state: State) -> dict[str, Tensor]:
    """Return the tensors of which a state has parts."""
    return {name: value.of if isinstance(value, Boxes) else value for name, value in state.items()}


def logical(name: str, value: Tensor | Boxes) -> Tensor | Boxes:
    """Return ``value`` with its shape on any mesh, and this rank's part of it. The result shares its memory."""
    if not isinstance(value, DTensor):
        return value
    local, (begin, size) = value.to_local(), box_of(value)
    if size != tuple(local.shape):
        raise ValueError(f"{name}: this rank holds {tuple(local.shape)}, where {value.placements} give {size}")
    return _boxes(name, value, {begin: local})


def owned(name: str, value: DTensor, experts: list[int]) -> Boxes:
    """Return this rank's part of a weight, or of its moments, whose rows are those of ``experts`` in this order."""
    (_, *rest), _ = box_of(value)
    parts = {(expert, *rest): row[None] for expert, row in zip(experts, value.to_local(), strict=True)}
    return _boxes(name, value, parts)


def _boxes(name: str, value: DTensor, parts: dict[tuple[int, ...], Tensor]) -> Boxes:
    """Return parts of a tensor, by their offsets, with its shape on any mesh."""
    if value.dim() != 4 or _STACKED not in name:
        return Boxes(value.shape, value.dtype, parts, value)
    experts, halves, width, hidden = value.shape
    views: dict[tuple[int, ...], Tensor] = {}
    for (expert, half, row, column), part in parts.items():
        views |= {(expert, (half + i) * width + row, column): part[:, i] for i in range(part.shape[1])}
    return Boxes(torch.Size((experts, halves * width, hidden)), value.dtype, views, value)


def view_of(value: Tensor | Boxes, index: MetadataIndex) -> Tensor:
    """Return the part of this rank's ``value`` that ``index`` names."""
    return value.views[tuple(index.offset or ())] if isinstance(value, Boxes) else value


def box_of(value: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return where this rank's part of ``value`` begins, and its shape.

    FSDP splits what other parallelism has left of a dimension. torch's own function for this is wrong if the parts are
    uneven.
    """
    begin, size = [0] * value.dim(), list(value.shape)
    coordinate = value.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank is not in the mesh"
    splits = list(zip(value.placements, value.device_mesh.shape, coordinate, strict=True))
    for placement, ranks, index in sorted(splits, key=lambda split: isinstance(split[0], _StridedShard)):
        if isinstance(placement, (Shard, _StridedShard)):
            dim = placement.dim
            part = -(-size[dim] // ranks)
            first = min(index * part, size[dim])
            begin[dim] += first
            size[dim] = min(part, size[dim] - first)
    return tuple(begin), tuple(size)
