"""Dispatch by all-gather: every rank gets all tokens, and computes its own experts on them.

T tokens of this rank, D hidden, K top-k, S tokens of all ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..collectives import PendingRows, all_gather_rows, reduce_scatter_rows, start_all_gather
from ..types import Experts, Routing
from .base import Dispatcher, as_computed


class AllGatherFlight(NamedTuple):
    """A dispatch that has started."""

    rows: PendingRows
    weights_SK: Tensor
    #: slots on this rank; -1 for choices of other ranks' experts
    slots_SK: Tensor
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
        rows = start_all_gather(as_computed(x_TD), sizes, axis, self.dispatch_wire)
        weights_SK = all_gather_rows(routing.weights_TK, sizes, axis)
        slots_TK = self.holders.to_slots(routing.ids_TK).int()
        slots_SK = all_gather_rows(slots_TK, sizes, axis).long() - axis.rank * self.slots
        here_SK = torch.where((slots_SK >= 0) & (slots_SK < self.slots), slots_SK, -1)
        return AllGatherFlight(rows, weights_SK, here_SK, sizes)

    def finish(self, flight: AllGatherFlight, experts: Experts) -> Tensor:
        y_SD = self.compute(flight.rows.wait(), flight.weights_SK, flight.slots_SK, experts, self.sizes_of)
        return reduce_scatter_rows(y_SD, flight.sizes, self.axis, self.combine_wire)
