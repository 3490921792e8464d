"""Tensors of a new checkpoint that are computed from those of others, by boxes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..checkpoint.tensors import Saved
from ..checkpoint.tools import Reader, pieces

#: offsets or sizes of a box
Box = tuple[int, ...]


class Computed:
    """Base class: any box has the values that the whole tensor has there."""

    #: the tensors, all in fp32
    wanted: dict[str, Saved]

    def box(self, name: str, offsets: Box, sizes: Box) -> Tensor:
        """Return a box of a tensor."""
        raise NotImplementedError

    def blocks(self, name: str, offsets: Box, sizes: Box) -> Iterator[Tensor]:
        """See :class:`equimoe.moe.checkpoint.tools.Source`."""
        for at, count in pieces(offsets, sizes, torch.float32.itemsize):
            yield self.box(name, at, count)


def saved(shape: Box) -> Saved:
    """Describe a tensor that is to be written."""
    return Saved(torch.float32, shape, ())


def inner(offsets: Box, sizes: Box) -> tuple[slice, ...]:
    """Return a box as slices."""
    return tuple(slice(first, first + count) for first, count in zip(offsets, sizes, strict=True))


def whole(reader: Reader, name: str) -> Tensor:
    """Return all of a tensor."""
    shape = reader.saved[name].shape
    return reader.box(name, (0,) * len(shape), shape).float()


def mean(readers: Sequence[Reader], name: str, offsets: Box, sizes: Box) -> Tensor:
    """Return the mean of a box of several models."""
    if len(readers) == 1:
        return readers[0].box(name, offsets, sizes).float()
    total = sum((reader.box(name, offsets, sizes).double() for reader in readers), torch.zeros((), dtype=torch.float64))
    return (total / len(readers)).float()
