"""Dispatch by all-to-all: sends each routed row to its expert's rank, at once or in chunks that overlap with experts.

T tokens, D hidden, K top-k, X rows sent, S rows received.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.permute import combine, permute
from ..collectives import PendingRows, start_exchange
from ..placement import Owners
from ..types import Experts, Routing
from .base import Dispatcher, Holders, as_computed
from .exchange_plan import ExchangePlan, dropless, equal, padded


class AllToAllFlight(NamedTuple):
    """A dispatch that has started."""

    tokens: int
    plan: ExchangePlan
    #: of each chunk, the exchange of rows with their gate weights; or (rows, weights) that are yet to be sent
    chunks: list[Any]


class AllToAllDispatcher(Dispatcher):
    """Sends one row per choice. Splits come from the senders' counts, or are fixed: by a padded capacity, or because
    the router chooses equally many experts of every rank."""

    chunks = 1

    def address(self, holders: Holders) -> None:
        super().address(holders)
        self.make_plan: Callable[..., ExchangePlan] = dropless
        if self.capacity is not None and self.capacity.pad:
            self.make_plan = partial(padded, capacity=self.capacity, num_experts=holders.num_experts)
        elif self.even and isinstance(holders, Owners):  # choices may go to any rank with a replica
            self.make_plan = equal

    def send(self, x_TD: Tensor, routing: Routing) -> AllToAllFlight:
        plan = self.make_plan(
            self.holders.to_slots(routing.ids_TK), self.all_slots, self.axis, self.chunks, self.backend
        )
        x_SD, weights_SK = as_computed(x_TD), routing.weights_TK
        if plan.order.inverse_SK.shape[0] > x_SD.shape[0]:
            x_SD, weights_SK = (torch.cat((t, t.new_zeros(1, t.shape[1]))) for t in (x_SD, weights_SK))
        return AllToAllFlight(x_TD.shape[0], plan, self._start(x_SD, weights_SK, plan))

    def finish(self, flight: AllToAllFlight, experts: Experts) -> Tensor:
        plan, going_home = flight.plan, []
        for c, pending in zip(plan.chunks, flight.chunks, strict=True):
            rows_SD, weights_S1 = pending.wait_all()
            y_SD = self.compute(rows_SD, weights_S1, c.ids_S1, experts, plan.sizes_of)
            going_home.append(start_exchange(y_SD, c.received, c.sent, self.axis, self.combine_wire))
        home = [pending.wait() for pending in going_home]
        y_XD = home[0] if len(home) == 1 else torch.cat(home)
        return combine(y_XD, plan.order, backend=self.backend)[: flight.tokens]

    def _start(self, x_SD: Tensor, weights_SK: Tensor, plan: ExchangePlan) -> list[PendingRows]:
        """Start the exchanges of all chunks at once. Later chunks arrive while the first are computed and returned."""
        rows_XD = permute(x_SD, plan.order, plan.rows, backend=self.backend)
        weights_X1 = weights_SK.reshape(-1, 1)[plan.order.order_R[: plan.rows]]
        sizes = [sum(chunk.sent) for chunk in plan.chunks]
        return [
            start_exchange(rows, c.sent, c.received, self.axis, self.dispatch_wire, (weights,))
            for c, rows, weights in zip(plan.chunks, rows_XD.split(sizes), weights_X1.split(sizes), strict=True)
        ]


class OverlappedDispatcher(AllToAllDispatcher):
    """Sends rows in chunks, which overlap with the experts. Each chunk has rows for every expert and rank (Tutel).

    The backward overlaps too: gradients of a chunk are sent while other chunks are computed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.chunks = self.config.chunks
