"""The verbs through which a layer communicates, over named axes of ranks.

With no process group every verb is the identity, so each stage runs, and is tested, in one process.
All ranks of an axis must call the same verbs in the same order, whatever their rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """The ranks along one dimension of the mesh, as this rank sees them."""

    name: str
    group: Any = None
    size: int = 1
    rank: int = 0

    def __deepcopy__(self, memo: dict) -> Axis:
        return self  # a process group is a handle; a copied layer talks to the same ranks


#: this rank alone
LOCAL = Axis("local")


def axis_of(name: str, group: Any) -> Axis:
    """The axis of a process group; one rank needs no communication."""
    size = dist.get_world_size(group)
    return Axis(name, group, size, dist.get_rank(group)) if size > 1 else Axis(name)


def world_axis() -> Axis:
    """All ranks of the default process group, or this one alone when there is none."""
    if dist.is_available() and dist.is_initialized():
        return axis_of("world", dist.group.WORLD)
    return LOCAL


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
    return Pending(value, dist.all_reduce(value, group=axis.group, async_op=True))


def exchange_counts(counts_PX: Tensor, axis: Axis) -> Tensor:
    """Row p goes to rank p; row p of the result came from rank p. No gradient."""
    if counts_PX.shape[0] != axis.size:
        raise ValueError(f"counts_PX has {counts_PX.shape[0]} rows for axis {axis.name!r} of {axis.size} ranks")
    if axis.size == 1:
        return counts_PX
    received = torch.empty_like(counts_PX)
    dist.all_to_all_single(received, counts_PX.contiguous(), group=axis.group)
    return received


def exchange_rows(rows: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
    """All-to-all of rows: ``sent[p]`` rows to rank p, ``received[p]`` from it, both in rank order.

    Differentiable; the gradient travels the same way back. ``received`` must come from the senders'
    own counts (:func:`exchange_counts`): a wrong one is undefined memory, not an error.
    """
    if len(sent) != axis.size or len(received) != axis.size or sum(sent) != rows.shape[0]:
        raise ValueError(
            f"splits {sent} and {received} do not fit {rows.shape[0]} rows on axis {axis.name!r} of {axis.size} ranks"
        )
    return rows if axis.size == 1 else _ExchangeRows.apply(rows, sent, received, axis)


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
        ctx.way_back = (received, sent, axis)
        return _all_to_all(rows, sent, received, axis)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(grad, *ctx.way_back), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
    out = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=axis.group)
    return out
