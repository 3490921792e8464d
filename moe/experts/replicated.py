"""Routed experts that also hold replicas of other ranks' experts.  S source rows, D hidden."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from ..collectives import PendingCopies
from ..types import DispatchPlan

#: (rows [S, D], plan, gate_up, down) -> each row's weighted sum over its experts
Compute = Callable[[Tensor, DispatchPlan, Tensor, Tensor], Tensor]


class ReplicatedExperts:
    """A rank's own experts and its replicas, for one forward. Their weights may still be on the way."""

    def __init__(self, compute: Compute, pending: PendingCopies) -> None:
        self._compute, self._pending = compute, pending
        self._weights: tuple[Tensor, ...] = ()

    def __call__(self, rows_SD: Tensor, plan: DispatchPlan) -> Tensor:
        gate_up, down = self.parameters()
        return self._compute(rows_SD, plan, gate_up, down)

    def parameters(self) -> Iterator[Tensor]:
        """Return the weights of all experts that the rank holds; wait for them first."""
        if not self._weights:
            self._weights = self._pending.wait()
        return iter(self._weights)
