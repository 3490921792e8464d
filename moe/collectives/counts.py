"""Sums, counts and sizes, without gradient."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .axes import Axis, device_of
from .kept import once
from .wire import note


class Pending:
    """A tensor whose sum over an axis is under way; :meth:`get` waits for it."""

    def __init__(self, value: Tensor, work: Any = None) -> None:
        self._value = value
        self._work = work

    def get(self) -> Tensor:
        """The summed tensor."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._value


def sum_over(value: Tensor, axis: Axis) -> Pending:
    """Start to sum ``value`` over the axis; its own memory takes the result. No gradient."""
    if axis.size == 1:
        return Pending(value)
    note("sum_over", axis, 2 * value.nbytes * (axis.size - 1) // axis.size)  # of a ring
    return Pending(value, dist.all_reduce(value, group=axis.group, async_op=True))


def exchange_counts(counts_PX: Tensor, axis: Axis) -> Tensor:
    """Row p goes to rank p; row p of the result came from rank p. No gradient."""
    if counts_PX.shape[0] != axis.size:
        raise ValueError(f"counts_PX has {counts_PX.shape[0]} rows for axis {axis.name!r} of {axis.size} ranks")
    return counts_PX if axis.size == 1 else once(lambda: _exchange_counts(counts_PX, axis))


def _exchange_counts(counts_PX: Tensor, axis: Axis) -> Tensor:
    note("exchange_counts", axis, counts_PX.nbytes * (axis.size - 1) // axis.size)
    received = counts_PX.clone()  # what a dry run, whose backend moves nothing, is to believe
    dist.all_to_all_single(received, counts_PX.contiguous(), group=axis.group)
    return received


#: (how many sizes, the axis) to what to believe of them
Belief = Callable[[int, Axis], list[int]]
_belief: Belief | None = None


@contextmanager
def believe_splits(belief: Belief) -> Iterator[None]:
    """Within it, :func:`splits` reads no tensors: those of a dry run have shapes, but no values."""
    global _belief
    before, _belief = _belief, belief
    try:
        yield
    finally:
        _belief = before


def splits(sent_P: Tensor, received_P: Tensor, axis: Axis) -> tuple[list[int], list[int]]:
    """Rows to and from each rank, for the host: it waits for the device here, and nowhere else in a layer."""
    if _belief is not None:
        return _belief(sent_P.numel(), axis), _belief(sent_P.numel(), axis)
    sent, received = torch.stack((sent_P, received_P)).tolist()
    return sent, received


def held_by_all(values: Sequence[object], axis: Axis) -> list[Any]:
    """Those of the values that every rank of the axis has, compared by ``repr``; the host waits for the answer."""
    if axis.size == 1 or _belief is not None:
        return list(values)
    device, hashes = device_of(axis), [zlib.crc32(repr(value).encode()) for value in values]
    most = torch.tensor(len(hashes), device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=axis.group)
    own = torch.tensor(hashes + [-1] * (int(most) - len(hashes)), dtype=torch.int64, device=device)
    everyones = [torch.empty_like(own) for _ in range(axis.size)]
    dist.all_gather(everyones, own, group=axis.group)
    held = torch.stack([torch.isin(own, theirs) for theirs in everyones]).all(0)
    return [value for value, by_all in zip(values, held, strict=False) if by_all]


def equal_sizes(rows: Tensor, axis: Axis) -> list[int]:
    """How many rows each rank has, where all are known to have equally many."""
    return [rows.shape[0]] * axis.size


def exchange_sizes(rows: Tensor, axis: Axis) -> list[int]:
    """How many rows each rank has; the host waits for the answer."""
    if axis.size == 1 or _belief is not None:
        return equal_sizes(rows, axis)
    mine_P = torch.full((axis.size, 1), rows.shape[0], dtype=torch.int64, device=rows.device)
    return exchange_counts(mine_P, axis).flatten().tolist()
