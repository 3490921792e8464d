"""Collectives for sums, counts and sizes, which have no gradient."""

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
from .traffic import note


class Pending:
    """The result of a collective that may still be running; :meth:`get` waits for it."""

    def __init__(self, value: Tensor, work: Any = None) -> None:
        self._value = value
        self._work = work

    def get(self) -> Tensor:
        """Wait for the result, and return it."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._value


def sum_over(value: Tensor, axis: Axis) -> Pending:
    """Start to sum ``value`` over the axis, in place. No gradient."""
    if axis.size == 1:
        return Pending(value)
    note("sum_over", axis, 2 * value.nbytes * (axis.size - 1) // axis.size)  # what a ring all-reduce sends
    return Pending(value, dist.all_reduce(value, group=axis.group, async_op=True))


def exchange_counts(counts_PX: Tensor, axis: Axis) -> Tensor:
    """Send row p to rank p; row p of the result is from rank p. No gradient."""
    if counts_PX.shape[0] != axis.size:
        raise ValueError(
            f"counts_PX.shape={tuple(counts_PX.shape)}: axis {axis.name!r} has size {axis.size}; pass one row per rank"
        )
    return counts_PX if axis.size == 1 else once(lambda: _exchange("exchange_counts", counts_PX, axis))


def exchange_slots(slots_PX: Tensor, axis: Axis) -> Tensor:
    """Like :func:`exchange_counts`, for the slots of rows whose number is known. The host does not wait for them."""
    return slots_PX if axis.size == 1 else once(lambda: _exchange("exchange_slots", slots_PX, axis))


def _exchange(verb: str, values_PX: Tensor, axis: Axis) -> Tensor:
    note(verb, axis, values_PX.nbytes * (axis.size - 1) // axis.size)
    received = values_PX.clone(memory_format=torch.contiguous_format)  # the result in a dry run, which moves no data
    dist.all_to_all_single(received, values_PX.contiguous(), group=axis.group)
    return received


#: (number of sizes, axis) -> the sizes to assume
AssumedSizes = Callable[[int, Axis], list[int]]
_assumed: AssumedSizes | None = None


@contextmanager
def assume_splits(sizes_of: AssumedSizes) -> Iterator[None]:
    """Context for a dry run, whose tensors have no values: :func:`splits` returns the sizes of ``sizes_of``."""
    global _assumed
    before, _assumed = _assumed, sizes_of
    try:
        yield
    finally:
        _assumed = before


def splits(sent_P: Tensor, received_P: Tensor, axis: Axis) -> tuple[list[int], list[int]]:
    """Return the numbers of rows to and from each rank as host integers, for which the host waits."""
    if _assumed is not None:
        return _assumed(sent_P.numel(), axis), _assumed(sent_P.numel(), axis)
    sent, received = on_host(sent_P, received_P)
    return sent, received


def on_host(*counts: Tensor) -> list[list[Any]]:
    """Copy counts to the host, all at once, as nested lists. The host waits for them."""
    flat = iter(torch.cat([t.flatten() for t in counts]).tolist())
    return [_nested(flat, list(t.shape)) for t in counts]


def _nested(flat: Iterator[int], shape: list[int]) -> Any:
    return [_nested(flat, shape[1:]) for _ in range(shape[0])] if shape else next(flat)


def gather_counts(counts_X: Tensor, axis: Axis) -> Tensor:
    """Gather the counts int64 [X] of all ranks, [P, X]. No gradient."""
    return counts_X[None] if axis.size == 1 else once(lambda: _gather_counts(counts_X, axis))


def _gather_counts(counts_X: Tensor, axis: Axis) -> Tensor:
    note("gather_counts", axis, counts_X.nbytes * (axis.size - 1))
    gathered = counts_X.repeat(axis.size)  # the result in a dry run, whose backend moves no data
    dist.all_gather_into_tensor(gathered, counts_X.contiguous(), group=axis.group)
    return gathered.view(axis.size, -1)


def held_by_all(values: Sequence[object], axis: Axis) -> list[Any]:
    """Return the values that every rank of the axis has, compared by ``repr``. The host waits for the answer."""
    if axis.size == 1 or _assumed is not None:
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
    """Return the number of rows of each rank, if all ranks are known to have the same number."""
    return [rows.shape[0]] * axis.size


def exchange_sizes(rows: Tensor, axis: Axis) -> list[int]:
    """Ask every rank for its number of rows. The host waits for the answer."""
    if axis.size == 1 or _assumed is not None:
        return equal_sizes(rows, axis)
    mine_P = torch.full((axis.size, 1), rows.shape[0], dtype=torch.int64, device=rows.device)
    return exchange_counts(mine_P, axis).flatten().tolist()
