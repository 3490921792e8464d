"""Every rank of the axis sees every token, and computes what its experts have to do with it.

T tokens of this rank, D hidden, K top-k, S tokens of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..collectives import gather_rows, reduce_scatter_rows, start_gather
from ..types import Experts, Routing
from .base import Dispatcher, as_computed, nothing


class AllGatherDispatcher(Dispatcher):
    """All-gather of tokens and routing, reduce-scatter of results.

    For few ranks, or K near their number; moves the same however tokens are routed. With ``equal_tokens`` the host
    waits for nothing.
    """

    def __call__(
        self, x_TD: Tensor, routing: Routing, experts: Experts, meanwhile: Callable[[], object] = nothing
    ) -> Tensor:
        axis = self.axis
        sizes = self.sizes_of(x_TD, axis)
        rows = start_gather(as_computed(x_TD), sizes, axis, self.there)
        weights_SK = gather_rows(routing.weights_TK, sizes, axis)
        slots_TK = self.owners.to_slots(routing.ids_TK).int()
        slots_SK = gather_rows(slots_TK, sizes, axis).long() - axis.rank * self.slots
        here_SK = torch.where((slots_SK >= 0) & (slots_SK < self.slots), slots_SK, -1)
        meanwhile()
        y_SD = self.compute(rows.wait(), weights_SK, here_SK, experts, self.sizes_of)
        return reduce_scatter_rows(y_SD, sizes, axis, self.home)
