"""Rows that travel between the ranks of an axis, and their gradients back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .axes import Axis
from .kept import once
from .wire import PLAIN, Codec, Wire, note


class _Way(NamedTuple):
    """Who sends how many rows to whom, in rank order."""

    verb: str
    axis: Axis
    #: None: all to everybody
    sent: list[int] | None
    received: list[int]
    #: ranks send equally many, which are added up
    summed: bool = False

    @property
    def rows(self) -> int:
        """How many there are on arrival."""
        return self.received[0] if self.summed else sum(self.received)


class Flight:
    """Rows on their way: a collective that has started, and how to read what arrives."""

    def __init__(self, rows: Tensor, way: _Way, codec: Codec) -> None:
        self.way, self.codec, self.dtype = way, codec, rows.dtype
        axis, sent, received = way.axis, way.sent, way.received
        payload = codec.encode(rows).contiguous()
        self.out = payload.new_empty((sum(received), *payload.shape[1:]))
        others = len(payload) * (axis.size - 1) if sent is None else len(payload) - sent[axis.rank]
        note(way.verb, axis, others * (payload[0].nbytes if len(payload) else 0))
        if sent is None and len(set(received)) == 1:
            self.work = dist.all_gather_into_tensor(self.out, payload, group=axis.group, async_op=True)
        else:
            if sent is None:  # as an all-to-all, because gathering unequal parts is not for every backend
                sent, payload = [len(payload)] * axis.size, payload.repeat(axis.size, *[1] * (payload.dim() - 1))
            self.work = dist.all_to_all_single(self.out, payload, received, sent, group=axis.group, async_op=True)
        self.payload: Tensor | None = payload  # not freed before it has left

    def land(self) -> Tensor:
        """Wait, once; the rows that arrived, or their sum."""
        if self.payload is not None:
            self.work.wait()
            self.work = self.payload = None
        rows = self.codec.decode(self.out.detach(), self.dtype)
        if not self.way.summed:
            return rows
        first, *others = rows.split(self.way.received)
        total = first.to(torch.promote_types(rows.dtype, torch.float32), copy=True)
        for part in others:
            total += part
        return total.to(rows.dtype)


class _Leg:
    """Ties a departure to its arrival, forward and backward."""

    def __init__(self, there: _Way, back: _Way, wire: Wire) -> None:
        self.there, self.back, self.wire = there, back, wire
        self.flight: Flight | None = None

    def land(self) -> Tensor:
        flight, self.flight = self.flight, None
        assert flight is not None
        return flight.land()


class _Depart(torch.autograd.Function):
    """Starts; the graph gets a token in the place of rows that are not there yet: their shape without their memory."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, leg: _Leg) -> Tensor:
        ctx.leg = leg
        leg.flight = once(lambda: Flight(rows, leg.there, leg.wire.forward))
        return rows.new_zeros(()).expand(leg.there.rows, *rows.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.leg.land(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, leg: _Leg) -> Tensor:
        ctx.leg = leg
        return leg.land()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        leg = ctx.leg
        leg.flight = Flight(grad, leg.back, leg.wire.backward)
        return grad.new_zeros(()).expand(grad.shape), None


class Transit:
    """Rows that are under way; :meth:`wait` gives those that arrive here.

    What is computed between start and wait runs while rows travel, and its backward while their gradients do.
    """

    def __init__(self, rows: Tensor, leg: _Leg) -> None:
        self._leg = leg if leg.there.axis.size > 1 else None
        self._token = rows if self._leg is None else _Depart.apply(rows, leg)

    def wait(self) -> Tensor:
        """The rows that arrived, in the order of the ranks that sent them."""
        return self._token if self._leg is None else _Arrive.apply(self._token, self._leg)


def start_exchange(rows: Tensor, sent: list[int], received: list[int], axis: Axis, wire: Wire = PLAIN) -> Transit:
    """Start an all-to-all of rows: ``sent[p]`` rows to rank p, ``received[p]`` from it, both in rank order.

    Differentiable; the gradient travels the same way back. ``received`` must come from the senders'
    own counts (:func:`exchange_counts`): a wrong one is undefined memory, not an error.
    """
    if len(sent) != axis.size or len(received) != axis.size or sum(sent) != rows.shape[0]:
        raise ValueError(
            f"splits {sent} and {received} do not fit {rows.shape[0]} rows on axis {axis.name!r} of {axis.size} ranks"
        )
    name = "exchange_rows"
    return Transit(rows, _Leg(_Way(name, axis, sent, received), _Way(name, axis, received, sent), wire))


def exchange_rows(rows: Tensor, sent: list[int], received: list[int], axis: Axis, wire: Wire = PLAIN) -> Tensor:
    """:func:`start_exchange`, and wait."""
    return start_exchange(rows, sent, received, axis, wire).wait()


def start_gather(rows: Tensor, sizes: list[int], axis: Axis, wire: Wire = PLAIN) -> Transit:
    """Start to bring the rows of all ranks here, in rank order; rank p has ``sizes[p]``.

    Its backward is that of :func:`reduce_scatter_rows`.
    """
    check_sizes(sizes, rows.shape[0], axis, sizes[axis.rank : axis.rank + 1])
    return Transit(rows, _Leg(gathering(sizes, axis), _reduce_scatter(sizes, axis), wire))


def gather_rows(rows: Tensor, sizes: list[int], axis: Axis, wire: Wire = PLAIN) -> Tensor:
    """:func:`start_gather`, and wait."""
    return start_gather(rows, sizes, axis, wire).wait()


def reduce_scatter_rows(rows: Tensor, sizes: list[int], axis: Axis, wire: Wire = PLAIN) -> Tensor:
    """This rank's ``sizes[rank]`` rows of the sum over ranks of ``rows``. Its backward is :func:`gather_rows`.

    Terms are added in rank order, in fp32 for 16-bit rows.
    """
    check_sizes(sizes, rows.shape[0], axis, sizes)
    return Transit(rows, _Leg(_reduce_scatter(sizes, axis), gathering(sizes, axis), wire)).wait()


def check_sizes(sizes: list[int], rows: int, axis: Axis, counted: list[int]) -> None:
    if len(sizes) != axis.size or sum(counted) != rows:
        raise ValueError(f"sizes {sizes} do not fit {rows} rows on axis {axis.name!r} of {axis.size} ranks")


def gathering(sizes: list[int], axis: Axis) -> _Way:
    return _Way("gather_rows", axis, None, sizes)


def _reduce_scatter(sizes: list[int], axis: Axis) -> _Way:
    return _Way("reduce_scatter_rows", axis, sizes, [sizes[axis.rank]] * axis.size, summed=True)
