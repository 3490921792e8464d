"""Dispatch by all-gather: every rank gets all tokens, and computes its own experts on them.

T tokens of this rank, D hidden, K top-k, S tokens of all ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..collectives import PendingRows, reduce_scatter_rows, start_all_gather
from ..types import Experts, Routing
from .base import Dispatcher, as_computed


class AllGatherFlight(NamedTuple):
    """A dispatch that has started."""

    #: rows, gate weights and slots of all ranks' tokens
    pending: PendingRows
    #: number of tokens of each rank
    sizes: list[int]


class AllGatherDispatcher(Dispatcher):
    """All-gathers tokens and routing, and reduce-scatters results.

    Good for few ranks, or if K is close to the number of ranks. Traffic does not depend on routing. With
    ``equal_tokens`` the host never waits for the device.
    """

    def send(self, x_TD: Tensor, routing: Routing) -> AllGatherFlight:
        axis = self.axis
        sizes = self.sizes_of(x_TD, axis)
        routed = routing.weights_TK, self.holders.to_slots(routing.ids_TK).int()
        return AllGatherFlight(start_all_gather(as_computed(x_TD), sizes, axis, self.dispatch_wire, routed), sizes)

    def finish(self, flight: AllGatherFlight, experts: Experts) -> Tensor:
        rows_SD, weights_SK, slots_SK = flight.pending.wait_all()
        slots_SK = slots_SK.long() - self.axis.rank * self.slots
        here_SK = torch.where((slots_SK >= 0) & (slots_SK < self.slots), slots_SK, -1)
        y_SD = self.compute(rows_SD, weights_SK, here_SK, experts, self.sizes_of)
        return reduce_scatter_rows(y_SD, flight.sizes, self.axis, self.combine_wire)
