"""Experts split over the ranks of an axis; each routed row travels to its expert's rank and back.

T tokens, D hidden, K top-k, R routed rows of this rank, S rows received, P ranks, e experts per rank.
Every rank runs the same collectives, also with no rows at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.permute import combine, permute
from ...kernels.sort_by_expert import sort_by_expert
from ..collectives import Axis, exchange_counts, exchange_rows
from ..types import DispatchPlan, RouteHome, Routing


class AllToAllDispatcher:
    """Dropless exchange whose receive splits come from the senders' counts."""

    def __init__(self, num_experts: int, axis: Axis, backend: str = "auto") -> None:
        if num_experts % axis.size:
            raise ValueError(f"num_experts={num_experts}: must be divisible by expert parallel = {axis.size} ranks")
        self.num_experts = num_experts
        self.axis = axis
        self.backend = backend

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, DispatchPlan]:
        """Rows [S, D] that this rank's experts have to do, and the way home."""
        order = sort_by_expert(routing.ids_TK, self.num_experts, backend=self.backend)
        counts_Pe = order.offsets_E.diff().view(self.axis.size, -1)
        received_Pe = exchange_counts(counts_Pe, self.axis)
        # the one copy to the host: an all-to-all must be told its split sizes
        sent, received = torch.stack((counts_Pe.sum(1), received_Pe.sum(1))).tolist()
        home = RouteHome(order, sent, received)
        kept = sum(sent)
        rows_RD = permute(_as_computed(x_TD), order, kept, backend=self.backend)
        weights_R1 = routing.weights_TK.reshape(-1, 1)[order.order_R[:kept]]
        rows_SD = exchange_rows(rows_RD, sent, received, self.axis)
        weights_S1 = exchange_rows(weights_R1, sent, received, self.axis)
        expert_of = torch.arange(received_Pe.shape[1], device=x_TD.device).repeat(self.axis.size)
        ids_S1 = expert_of.repeat_interleave(received_Pe.flatten(), output_size=sum(received))[:, None]
        here = sort_by_expert(ids_S1, received_Pe.shape[1], backend=self.backend)
        return rows_SD, DispatchPlan(weights_S1, here, home)

    def combine(self, rows_SD: Tensor, plan: DispatchPlan) -> Tensor:
        """Send the results [S, D] home and sum each token's choices: [T, D]."""
        assert plan.route_home is not None
        home = plan.route_home
        rows_RD = exchange_rows(rows_SD, home.received, home.sent, self.axis)
        return combine(rows_RD, home.order, backend=self.backend)


def _as_computed(x_TD: Tensor) -> Tensor:
    """Rows travel in the dtype in which they will be computed."""
    device = x_TD.device.type
    return x_TD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x_TD
