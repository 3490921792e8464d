"""All experts live on this rank: nothing moves. T tokens, D hidden."""

from __future__ import annotations

from torch import Tensor

from ...kernels.sort_by_expert import sort_by_expert
from ..types import DispatchPlan, Routing


class LocalDispatcher:
    """The tokens themselves are the source rows; the experts gather them as they go."""

    def __init__(self, num_experts: int, backend: str = "auto") -> None:
        self.num_experts = num_experts
        self.backend = backend

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, DispatchPlan]:
        """Source rows [T, D] and where each of their choices stands."""
        order = sort_by_expert(routing.ids_TK, self.num_experts, backend=self.backend)
        return x_TD, DispatchPlan(routing.weights_TK, order)

    def combine(self, rows_TD: Tensor, plan: DispatchPlan) -> Tensor:
        """The experts have summed each token's choices already."""
        return rows_TD
