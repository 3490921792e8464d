"""Every rank of the axis sees every token, and computes what its experts have to do with it.

T tokens of this rank, D hidden, K top-k, S tokens of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..collectives import exchange_sizes, gather_rows, reduce_scatter_rows, start_gather
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
        equal, axis = self.config.equal_tokens, self.axis
        sizes = [x_TD.shape[0]] * axis.size if equal else exchange_sizes(x_TD, axis)
        rows = start_gather(as_computed(x_TD), sizes, axis, self.there)
        weights_SK = gather_rows(routing.weights_TK, sizes, axis)
        ids_SK = gather_rows(routing.ids_TK.int(), sizes, axis).long() - axis.rank * self.experts_here
        here_SK = torch.where((ids_SK >= 0) & (ids_SK < self.experts_here), ids_SK, -1)
        etp_sizes = [sum(sizes)] * self.etp.size if equal and self.etp.size > 1 else None
        meanwhile()
        y_SD = self.compute(rows.wait(), weights_SK, here_SK, experts, etp_sizes)
        return reduce_scatter_rows(y_SD, sizes, axis, self.home)
