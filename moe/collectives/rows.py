"""Differentiable exchanges of rows between the ranks of an axis; gradients travel the other way."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .axes import Axis
from .codec import PLAIN, Codec, Wire
from .kept import once
from .packing import Packing
from .traffic import note


class Direction(NamedTuple):
    """One direction of an exchange: the number of rows sent to and received from each rank, in rank order."""

    verb: str
    axis: Axis
    #: None: all rows to every rank
    sent: list[int] | None
    received: list[int]
    #: every rank sends the same number of rows, and the result is their sum
    summed: bool = False

    @property
    def rows(self) -> int:
        """Number of rows in the result."""
        return self.received[0] if self.summed else sum(self.received)


class RowCollective:
    """A collective that has started, and how to decode the rows that it receives.

    ``extras`` [S, ...] of any dtypes travel with the rows, bit by bit; only the rows are encoded.
    """

    def __init__(self, rows: Tensor, direction: Direction, codec: Codec, extras: tuple[Tensor, ...] = ()) -> None:
        self.direction, self.codec, self.dtype = direction, codec, rows.dtype
        axis, sent, received = direction.axis, direction.sent, direction.received
        tensors = (codec.encode(rows), *extras)
        self.packing = Packing(tensors)
        payload = self.packing.pack(tensors)
        self.out = payload.new_empty((sum(received), *payload.shape[1:]))
        others = len(payload) * (axis.size - 1) if sent is None else len(payload) - sent[axis.rank]
        note(direction.verb, axis, others * (payload[0].nbytes if len(payload) else 0))
        if sent is None and len(set(received)) == 1:
            self.work = dist.all_gather_into_tensor(self.out, payload, group=axis.group, async_op=True)
        else:
            if sent is None:  # not every backend can gather unequal parts, so use an all-to-all
                sent, payload = [len(payload)] * axis.size, payload.repeat(axis.size, *[1] * (payload.dim() - 1))
            self.work = dist.all_to_all_single(self.out, payload, received, sent, group=axis.group, async_op=True)
        self.payload: Tensor | None = payload  # kept alive until the send completes

    def wait(self) -> tuple[Tensor, ...]:
        """Wait for the collective; return the rows and extras received, or their sums."""
        if self.payload is not None:
            self.work.wait()
            self.work = self.payload = None
        rows, *extras = self.packing.unpack(self.out.detach())
        found = (self.codec.decode(rows, self.dtype), *(extra.contiguous() for extra in extras))
        return tuple(self._sum(part) for part in found) if self.direction.summed else found

    def _sum(self, rows: Tensor) -> Tensor:
        first, *others = rows.split(self.direction.received)
        total = first.to(torch.promote_types(rows.dtype, torch.float32), copy=True)
        for part in others:
            total += part
        return total.to(rows.dtype)


class _Exchange:
    """Connects the start of an exchange with its end: ``forward`` for rows, ``backward`` for their gradients."""

    def __init__(self, forward: Direction, backward: Direction, wire: Wire) -> None:
        self.forward, self.backward, self.wire = forward, backward, wire
        #: whether the rows, and each of the extras, have a gradient
        self.trained: tuple[bool, ...] = ()
        self.running: RowCollective | None = None

    def constants(self, tensors: tuple[Tensor, ...]) -> list[Tensor]:
        """Return those of the rows and extras that have no gradient."""
        return [tensor for tensor, trained in zip(tensors, self.trained, strict=True) if not trained]

    def start_back(self, grads: tuple[Tensor, ...]) -> None:
        first, *others = [grad for grad, trained in zip(grads, self.trained, strict=True) if trained]
        codec = self.wire.backward if self.trained[0] else PLAIN.backward
        self.running = RowCollective(first, self.backward, codec, tuple(others))

    def wait(self) -> tuple[Tensor, ...]:
        running, self.running = self.running, None
        assert running is not None
        return running.wait()


def _tokens(tensors: tuple[Tensor, ...], rows: int) -> tuple[Tensor, ...]:
    """Return tensors of the same dtypes with ``rows`` rows, but without their memory."""
    return tuple(tensor.new_zeros(()).expand(rows, *tensor.shape[1:]) for tensor in tensors)


class _Start(torch.autograd.Function):
    """Starts the exchange, and puts tokens into the graph: tensors of the results' shapes, but without their memory."""

    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange, exchange.trained = exchange, ctx.needs_input_grad[1:]
        rows, *extras = tensors
        exchange.running = once(lambda: RowCollective(rows, exchange.forward, exchange.wire.forward, tuple(extras)))
        tokens = _tokens(tensors, exchange.forward.rows)
        ctx.mark_non_differentiable(*exchange.constants(tokens))
        return tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *tokens: Tensor) -> tuple[Tensor | None, ...]:
        received = iter(ctx.exchange.wait())
        return None, *(next(received) if trained else None for trained in ctx.exchange.trained)


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, *tokens: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        received = exchange.wait()
        ctx.mark_non_differentiable(*exchange.constants(received))
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.exchange.start_back(grads)
        tokens = _tokens(grads, len(grads[0]))
        return None, *(t if trained else None for t, trained in zip(tokens, ctx.exchange.trained, strict=True))


class PendingRows:
    """An exchange of rows, and perhaps of ``extras``, that has started; :meth:`wait` returns the rows received.

    Computation between start and wait overlaps with the exchange, in the forward and in the backward.
    """

    def __init__(self, exchange: _Exchange, rows: Tensor, extras: tuple[Tensor, ...] = ()) -> None:
        self._exchange = exchange if exchange.forward.axis.size > 1 else None
        tensors = (rows, *extras)
        self._tokens: tuple[Tensor, ...] = tensors if self._exchange is None else _Start.apply(exchange, *tensors)

    def wait(self) -> Tensor:
        """Wait for the rows received, and return them in the order of the ranks that sent them."""
        return self.wait_all()[0]

    def wait_all(self) -> tuple[Tensor, ...]:
        """Do the same, and return the extras after the rows."""
        return self._tokens if self._exchange is None else _Finish.apply(self._exchange, *self._tokens)


def start_exchange(
    rows: Tensor,
    sent: list[int],
    received: list[int],
    axis: Axis,
    wire: Wire = PLAIN,
    extras: tuple[Tensor, ...] = (),
) -> PendingRows:
    """Start an all-to-all of rows: ``sent[p]`` rows to rank p, ``received[p]`` from it, both in rank order.

    ``extras`` [S, ...] have an entry for each row, which travels with it in the same collective; they are never rounded
    to the rows' wire format. Differentiable in rows and extras; all gradients travel the other way together.
    ``received`` must come from the senders' counts (:func:`exchange_counts`): wrong sizes are not detected, and yield
    undefined values.
    """
    if len(sent) != axis.size or len(received) != axis.size or sum(sent) != rows.shape[0]:
        raise ValueError(
            f"sent={sent}, received={received}: do not fit rows.shape={tuple(rows.shape)} and axis {axis.name!r} of "
            f"size {axis.size}; give one size per rank, and sizes sent that add up to the rows"
        )
    name = "exchange_rows"
    exchange = _Exchange(Direction(name, axis, sent, received), Direction(name, axis, received, sent), wire)
    return PendingRows(exchange, rows, extras)


def exchange_rows(rows: Tensor, sent: list[int], received: list[int], axis: Axis, wire: Wire = PLAIN) -> Tensor:
    """Run :func:`start_exchange`, and wait."""
    return start_exchange(rows, sent, received, axis, wire).wait()


def start_all_gather(
    rows: Tensor, sizes: list[int], axis: Axis, wire: Wire = PLAIN, extras: tuple[Tensor, ...] = ()
) -> PendingRows:
    """Start to gather the rows of all ranks, in rank order; rank p has ``sizes[p]`` rows.

    ``extras`` travel with the rows, see :func:`start_exchange`. The backward is a :func:`reduce_scatter_rows`.
    """
    check_sizes(sizes, rows.shape[0], axis, sizes[axis.rank : axis.rank + 1])
    return PendingRows(_Exchange(all_gathering(sizes, axis), _reduce_scatter(sizes, axis), wire), rows, extras)


def all_gather_rows(rows: Tensor, sizes: list[int], axis: Axis, wire: Wire = PLAIN) -> Tensor:
    """Run :func:`start_all_gather`, and wait."""
    return start_all_gather(rows, sizes, axis, wire).wait()


def reduce_scatter_rows(rows: Tensor, sizes: list[int], axis: Axis, wire: Wire = PLAIN) -> Tensor:
    """Sum ``rows`` over the ranks and return this rank's ``sizes[rank]`` rows.

    The backward is an :func:`all_gather_rows`. Terms are added in rank order; 16-bit rows in fp32.
    """
    check_sizes(sizes, rows.shape[0], axis, sizes)
    return PendingRows(_Exchange(_reduce_scatter(sizes, axis), all_gathering(sizes, axis), wire), rows).wait()


def check_sizes(sizes: list[int], rows: int, axis: Axis, counted: list[int]) -> None:
    if len(sizes) != axis.size or sum(counted) != rows:
        raise ValueError(
            f"sizes={sizes}: do not fit axis {axis.name!r} of size {axis.size} and rows={rows}; "
            "give each rank's number of rows"
        )


def all_gathering(sizes: list[int], axis: Axis) -> Direction:
    return Direction("all_gather_rows", axis, None, sizes)


def _reduce_scatter(sizes: list[int], axis: Axis) -> Direction:
    return Direction("reduce_scatter_rows", axis, sizes, [sizes[axis.rank]] * axis.size, summed=True)
