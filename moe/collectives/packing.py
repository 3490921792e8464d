"""Lays the rows of several tensors side by side, so that one collective carries them all.  S rows, B bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: bytes of a packed row are a multiple of this, so that a kernel can load any row in words of 16 bytes
ALIGNMENT = 16

#: the widest one that fits is copied at a time
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


class _Place(NamedTuple):
    """Where a tensor's row lies in a packed row, in bytes."""

    first: int
    end: int
    dtype: torch.dtype
    #: shape of a row
    shape: torch.Size

    @property
    def word(self) -> torch.dtype:
        return next(word for word in _WORDS if self.first % word.itemsize == self.end % word.itemsize == 0)


class Packing:
    """The layout of ``tensors`` [S, ...] of any dtypes in one tensor uint8 [S, B]. A single tensor stays as it is.

    Bits are copied, so nothing is rounded. Each part starts at a multiple of its element size.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.places: list[_Place] = []
        end = 0
        for tensor in tensors:
            first = _round_up(end, tensor.element_size())
            end = first + tensor.element_size() * math.prod(tensor.shape[1:])
            self.places.append(_Place(first, end, tensor.dtype, tensor.shape[1:]))
        self.bytes = _round_up(end, ALIGNMENT)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the rows side by side. Bytes of no tensor are undefined."""
        if len(tensors) == 1:
            return tensors[0].contiguous()
        rows = len(tensors[0])
        payload = torch.empty(rows, self.bytes, dtype=torch.uint8, device=tensors[0].device)
        for place, tensor in zip(self.places, tensors, strict=True):
            source = tensor.contiguous().view(rows, math.prod(place.shape)).view(place.word)
            payload[:, place.first : place.end].view(place.word).copy_(source)
        return payload

    def unpack(self, payload: Tensor) -> list[Tensor]:
        """Return each tensor's rows, as views of the payload, of whose rows they are a part."""
        if len(self.places) == 1:
            return [payload]
        return [
            payload[:, place.first : place.end].view(place.dtype).view(len(payload), *place.shape)
            for place in self.places
        ]


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
