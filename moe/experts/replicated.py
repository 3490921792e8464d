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

    ``start`` starts to copy the weights.
    """

    def __init__(self, compute: Compute, start: Callable[[], PendingCopies]) -> None:
        self._compute, self._start, self._pending = compute, start, start()
        self._weights: tuple[Tensor, ...] = ()

    def __call__(self, rows_SD: Tensor, plan: DispatchPlan) -> Tensor:
        gate_up, down = self.parameters()
        return self._compute(rows_SD, plan, gate_up, down)

    def parameters(self) -> Iterator[Tensor]:
        """Return the weights of all experts that the rank holds; wait for them first."""
        if not self._weights:
            self._weights = self._pending.wait()
        return iter(self._weights)

    def free(self, y_TD: Tensor) -> Tensor:
        """Free the weights until the backward of ``y_TD``, the result of all that was computed; return ``y_TD``."""
        return _Freed.apply(y_TD, self) if y_TD.requires_grad else y_TD

    @torch.no_grad()
    def copy_again(self) -> None:
        """Fill the freed weights in place."""
        for weight, value in zip(self._weights, self._start().wait(), strict=True):
            weight.untyped_storage().resize_(weight.nbytes)
            weight.data.copy_(value)  # autograd would take another in-place change for an error


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
