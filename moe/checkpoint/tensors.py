"""Describes the tensors of a checkpoint: dtype, shape, and the chunks that hold the values."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .manifest import short

#: dtypes that a checkpoint can hold, with their names in safetensors files
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPE_OF_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_MAX_DIMS = 64  # torch's own limit


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and the location of its values in a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    #: key in a safetensors file; in a file of the legacy format, (first byte, number of bytes)
    place: str | tuple[int, int]


@dataclass(frozen=True)
class Saved:
    """The description of a tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def check(self) -> None:
        """Raise ValueError unless the chunks cover every element exactly once.

        Chunks form a grid, because a mesh splits each dimension on its own.
        """
        if len(self.shape) > _MAX_DIMS or not all(map(_is_size, self.shape)):
            raise ValueError(f"shape {short(self.shape)} is not a valid shape")
        for chunk in self.chunks:
            if not len(chunk.offsets) == len(chunk.sizes) == len(self.shape):
                raise ValueError(f"a chunk and shape {short(self.shape)} have different numbers of dimensions")
            if not all(map(_is_size, (*chunk.offsets, *chunk.sizes))):
                raise ValueError(f"chunk at {short(chunk.offsets)} of {short(chunk.sizes)} is not a box")
        if len(self.chunks) == 1 and self.chunks[0].sizes == self.shape and not any(self.chunks[0].offsets):
            return  # the usual case, and much faster
        full = [chunk for chunk in self.chunks if all(chunk.sizes)]
        cells, covered = 1, bool(full) == bool(math.prod(self.shape))
        for dim, length in enumerate(self.shape):
            cuts = sorted({(chunk.offsets[dim], chunk.sizes[dim]) for chunk in full})
            ends = [0, *(offset + size for offset, size in cuts)]
            covered &= not full or ([offset for offset, _ in cuts], length) == (ends[:-1], ends[-1])
            cells *= len(cuts)
        if not covered or len(full) != cells or len({chunk.offsets for chunk in full}) != cells:
            raise ValueError(f"chunks overlap, leave holes or exceed shape {short(self.shape)}")


#: opens a file of a checkpoint; yields a function that reads a box of a chunk of that file
Opened = Callable[[Path], AbstractContextManager[Callable[[Chunk, tuple[slice, ...]], Tensor]]]


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
