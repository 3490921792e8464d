"""Routed experts that also hold replicas of other ranks' experts.  S source rows, T tokens, D hidden."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..collectives import PendingCopies
from ..types import DispatchPlan

#: (rows [S, D], plan, gate_up, down) -> each row's weighted sum over its experts
Compute = Callable[[Tensor, DispatchPlan, Tensor, Tensor], Tensor]


class ReplicatedExperts:
    """A rank's own experts and its replicas, for one forward. Their weights may still be on the way.

    ``start`` starts to copy the weights. With ``first``, the replicas come after those that it has.
    """

    def __init__(
        self, compute: Compute, start: Callable[[], PendingCopies], first: ReplicatedExperts | None = None
    ) -> None:
        self._compute, self._first, self._pending = compute, first, start()
        self._starts: list[Callable[[], PendingCopies]] = [*(() if first is None else first._starts), start]
        self._weights: tuple[Tensor, ...] = ()

    def __call__(self, rows_SD: Tensor, plan: DispatchPlan) -> Tensor:
        gate_up, down = self.parameters()
        return self._compute(rows_SD, plan, gate_up, down)

    def parameters(self) -> Iterator[Tensor]:
        """Return the weights of all experts that the rank holds; wait for them first."""
        if not self._weights:
            first = () if self._first is None else tuple(self._first.parameters())
            self._weights, self._first = _joined(first, self._pending), None
        return iter(self._weights)

    def free(self, y_TD: Tensor) -> Tensor:
        """Free the weights until the backward of ``y_TD``, the result of all that was computed; return ``y_TD``."""
        return _Freed.apply(y_TD, self) if y_TD.requires_grad else y_TD

    @torch.no_grad()
    def copy_again(self) -> None:
        """Fill the freed weights in place."""
        values: tuple[Tensor, ...] = ()
        for pending in [start() for start in self._starts]:
            values = _joined(values, pending)
        for weight, value in zip(self._weights, values, strict=True):
            weight.untyped_storage().resize_(weight.nbytes)
            weight.data.copy_(value)  # autograd would take another in-place change for an error


def _joined(first: tuple[Tensor, ...], pending: PendingCopies) -> tuple[Tensor, ...]:
    """Append the rows that have been received to ``first``; if that is empty, to this rank's own."""
    weights = pending.wait()
    if not first:
        return weights
    return tuple(torch.cat((f, w[len(w) - pending.received :])) for f, w in zip(first, weights, strict=True))


class _Freed(torch.autograd.Function):
    """Frees weights in the forward. Its backward, the layer's first, copies them again."""

    @staticmethod
    def forward(ctx: Any, y_TD: Tensor, experts: ReplicatedExperts) -> Tensor:
        ctx.experts = experts
        for weight in experts.parameters():
            weight.untyped_storage().resize_(0)
        return y_TD.view_as(y_TD)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        ctx.experts.copy_again()
        return grad_TD, None
