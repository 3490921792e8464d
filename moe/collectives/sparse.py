"""Copies some of each rank's rows to some ranks: a sparse all-gather, and its adjoint, a sparse reduce-scatter.

N own rows, R received rows, P ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .axes import Axis
from .codec import PLAIN
from .rows import Direction, RowCollective


@dataclass(frozen=True, eq=False)
class Route:
    """What this rank sends and receives. The ranks' routes must match, and either all or none of them be empty."""

    axis: Axis
    #: own rows that each rank gets, each at most once
    sent: list[list[int]]
    #: number of rows from each rank
    received: list[int]
    #: bytes that this rank has sent, one entry per exchange
    log: list[int] = field(default_factory=list)

    @cached_property
    def rows(self) -> list[int]:
        """Own rows in the order in which they are sent."""
        return [row for rows in self.sent for row in rows]

    @cached_property
    def there(self) -> Direction:
        """The exchange of copies."""
        return Direction("sparse_all_gather", self.axis, [len(rows) for rows in self.sent], self.received)

    @cached_property
    def back(self) -> Direction:
        """The exchange of the copies' gradients."""
        return Direction("sparse_reduce_scatter", self.axis, self.received, [len(rows) for rows in self.sent])


class _Copying:
    """Connects the start of an exchange with its end, in the forward and in the backward."""

    def __init__(self, route: Route, weights: tuple[Tensor, ...]) -> None:
        self.route, self.weights = route, weights
        self.shapes = [weight.shape[1:] for weight in weights]
        self.running: RowCollective | None = None
        self.grads: tuple[Tensor, ...] = ()

    def start(self, tensors: tuple[Tensor, ...], rows: list[int] | None, direction: Direction) -> RowCollective:
        """Send ``rows`` (None: all) of several tensors together."""
        # by views, because a list as an index would be copied to the device, for which the host waits
        parts = [t if rows is None else torch.stack([t[row] for row in rows]) if rows else t[:0] for t in tensors]
        payload = torch.cat([part.flatten(1) for part in parts], dim=1)
        self.route.log.append(payload.nbytes)
        return RowCollective(payload, direction, PLAIN.forward)

    def wait(self) -> list[Tensor]:
        """Wait, and return what was received for each tensor."""
        running, self.running = self.running, None
        assert running is not None
        (payload,) = running.wait()
        parts = payload.split([shape.numel() for shape in self.shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)]


class _Start(torch.autograd.Function):
    """Starts the exchange, and puts tokens into the graph: tensors of the results' shapes, without their memory."""

    @staticmethod
    def forward(ctx: Any, copying: _Copying, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.copying, route = copying, copying.route
        copying.running = copying.start(weights, route.rows, route.there)
        return tuple(w.new_zeros(()).expand(len(w) + sum(route.received), *w.shape[1:]) for w in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *tokens: Tensor) -> tuple[Tensor | None, ...]:
        copying: _Copying = ctx.copying
        grads, copying.grads = copying.grads, ()
        for grad, arrived in zip(grads, copying.wait(), strict=True):
            _add(grad, arrived, copying.route.rows)
        return None, *grads


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, copying: _Copying, *tokens: Tensor) -> tuple[Tensor, ...]:
        ctx.copying, weights = copying, copying.weights
        copying.weights = ()
        return tuple(torch.cat(pair) for pair in zip(weights, copying.wait(), strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        copying: _Copying = ctx.copying
        received = sum(copying.route.received)
        own = [len(grad) - received for grad in grads]
        copying.running = copying.start(
            tuple(grad[number:] for grad, number in zip(grads, own, strict=True)), None, copying.route.back
        )
        copying.grads = tuple(grad[:number].contiguous() for grad, number in zip(grads, own, strict=True))
        return None, *(grad.new_zeros(()).expand(grad.shape) for grad in grads)


@torch.no_grad()
def _add(grad: Tensor, arrived: Tensor, rows: list[int]) -> None:
    """Add the gradients of copies to those of the rows they are copies of, in their order; 16-bit ones in fp32."""
    copies: dict[int, list[Tensor]] = {}
    for row, copy in zip(rows, arrived, strict=True):
        copies.setdefault(row, []).append(copy)
    for row, parts in copies.items():
        total = grad[row].to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        for part in parts:
            total += part
        grad[row] = total.to(grad.dtype)


class PendingCopies:
    """A sparse all-gather that has started; :meth:`wait` returns own rows and received ones."""

    def __init__(self, weights: tuple[Tensor, ...], route: Route | None) -> None:
        #: number of rows from other ranks
        self.received = 0 if route is None else sum(route.received)
        self._copying = None if route is None else _Copying(route, tuple(w.detach() for w in weights))
        self._tokens = weights if self._copying is None else _Start.apply(self._copying, *weights)

    def wait(self) -> tuple[Tensor, ...]:
        """Return each tensor [N + R, ...]: own rows, then received ones by the rank that sent them and its order."""
        return self._tokens if self._copying is None else _Finish.apply(self._copying, *self._tokens)


def start_sparse_all_gather(weights: tuple[Tensor, ...], route: Route | None) -> PendingCopies:
    """Start to copy rows of ``weights``, tensors [N, ...] of one dtype, to the ranks that ``route`` names.

    A row of all tensors travels together. Differentiable: the backward is a sparse reduce-scatter, in which a row gets
    the sum of its own gradient and those of its copies, added in rank order. Computation between start and wait
    overlaps with the exchange, in both directions. ``route=None`` sends nothing, and calls no collective.
    """
    return PendingCopies(weights, route)
