"""Tensors of a new checkpoint that are computed from those of others, by boxes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..checkpoint.tensors import Saved
from ..checkpoint.tools import Reader, pieces

#: deviation of new routers' weights
ROUTER_STD = 0.02
#: random numbers that share a generator
_BLOCK = 1 << 16
#: offsets or sizes of a box
Box = tuple[int, ...]
#: the projections of a feed-forward
Kind = Literal["gate", "up", "down"]


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


def share_of(ratio: float, count: int) -> int:
    """Return floor(ratio * count) of a ratio in decimals: 0.29 of 100 are 29, although the product is below 29."""
    return math.floor(round(ratio * count, 6))


def inner(offsets: Box, sizes: Box) -> tuple[slice, ...]:
    """Return a box as slices."""
    return tuple(slice(first, first + count) for first, count in zip(offsets, sizes, strict=True))


def whole(reader: Reader, name: str) -> Tensor:
    """Return all of a tensor."""
    shape = reader.saved[name].shape
    return reader.box(name, (0,) * len(shape), shape).float()


class FeedForwards:
    """The matrices of dense feed-forwards, of which it holds a gate and an up projection, or a down projection."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        self.readers = readers
        self._held: dict[Kind, tuple[tuple[str, int], Tensor]] = {}

    def matrix(self, kind: Kind, prefix: str, model: int = 0) -> Tensor:
        """Return a matrix of the feed-forward whose tensors have names with this prefix."""
        if kind not in self._held or self._held[kind][0] != (prefix, model):
            for other in ("gate", "up") if kind == "down" else ("down", kind):
                self._held.pop(other, None)
            self._held[kind] = (prefix, model), whole(self.readers[model], f"{prefix}{kind}_proj.weight")
        return self._held[kind][1]


def normal(seed: int, name: str, first: int, last: int, width: int) -> Tensor:
    """Return rows ``first`` to ``last`` of a matrix of standard normal numbers, which depends on seed and name only."""
    each = max(1, _BLOCK // width)
    found = []
    for number in range(first // each, math.ceil(last / each)):
        block = torch.randn(each, width, generator=generator(seed, f"{name} {number}"))
        found.append(block[max(first - number * each, 0) : last - number * each])
    return torch.cat(found)


def generator(seed: int, name: str) -> torch.Generator:
    """Return a generator of random numbers that depend on seed and name only."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def router_row(seed: int, prefix: str, row: int, width: int) -> Tensor:
    """Return a row of the new router of the feed-forward with this prefix."""
    return ROUTER_STD * normal(seed, f"{prefix}router", row, row + 1, width)[0]


def mean(readers: Sequence[Reader], name: str, offsets: Box, sizes: Box) -> Tensor:
    """Return the mean of a box of several models."""
    if len(readers) == 1:
        return readers[0].box(name, offsets, sizes).float()
    total = sum((reader.box(name, offsets, sizes).double() for reader in readers), torch.zeros((), dtype=torch.float64))
    return (total / len(readers)).float()
