"""Routed experts of unequal width (HMoE, arXiv 2408.10681).

An expert of width m u is stored and computed as m chunks of width u, whose outputs are summed.

E experts of this rank, S source rows, K choices of a row, M most chunks of an expert, C chunks of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ...kernels.expert_mlp import MainGrads
from ...kernels.sort_by_expert import ExpertOrder, sort_by_expert
from ..types import DispatchPlan
from .routed import RoutedExperts


class UnequalExperts(RoutedExperts):
    """MLPs of unequal width in one grouped product. Expert i is ``chunks[i]`` consecutive rows of the stacked weights.

    A row costs its expert's own width: nothing is padded to the widest. Without host synchronisation (not on a CPU),
    memory is reserved as if all rows had chosen the widest expert.
    """

    def __init__(self, chunks: Sequence[int], *args: Any, **kwargs: Any) -> None:
        super().__init__(sum(chunks), *args, **kwargs)
        self.chunks = tuple(chunks)
        self._tables: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def compute(
        self,
        rows_SD: Tensor,
        plan: DispatchPlan,
        gate_up: Tensor,
        down: Tensor,
        main_grads: MainGrads = (None, None),
    ) -> Tensor:
        experts = plan.experts or tuple(range(len(self.chunks)))
        table_EM = self._table(experts, rows_SD.device)
        order = self._by_chunk(plan.order, table_EM, sum(self.chunks[e] for e in experts))
        plan = DispatchPlan(plan.weights_SK.repeat_interleave(table_EM.shape[1], 1), order)
        return super().compute(rows_SD, plan, gate_up, down, main_grads)

    def _by_chunk(self, order: ExpertOrder, table_EM: Tensor, chunks: int) -> ExpertOrder:
        """Replace each choice of an expert by choices of its chunks, [S, K M]; -1 for chunks that it does not have."""
        expert_SK = torch.searchsorted(order.offsets_E, order.inverse_SK, right=True) - 1  # the last row: no choice
        return sort_by_expert(table_EM[expert_SK].flatten(1), chunks, backend=self.backend)

    def _table(self, experts: tuple[int, ...], device: torch.device) -> Tensor:
        """Return the chunks of these experts, int64 [E + 1, M], counted from the first; -1 for none."""
        if (experts, device) not in self._tables:
            numbers = [self.chunks[e] for e in experts]
            first, most = [0, *accumulate(numbers)], max(numbers)
            rows = [[first[i] + j if j < n else -1 for j in range(most)] for i, n in enumerate(numbers)]
            self._tables[experts, device] = torch.tensor([*rows, [-1] * most], device=device)
        return self._tables[experts, device]
