"""What all dispatchers have in common.  T tokens, D hidden, K top-k, S source rows of an expert's rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...kernels.sort_by_expert import sort_by_expert
from ..collectives import LOCAL, Axis, equal_sizes, exchange_sizes, gather_rows, reduce_scatter_rows
from ..config import CapacityConfig, DispatchConfig
from ..placement import Owners
from ..types import DispatchPlan, Experts, Routing
from .wire import WIRES

#: (rows, axis) to the number of rows on each rank of the axis
SizesOf = Callable[[Tensor, Axis], list[int]]


class Dispatcher(ABC):
    """Brings tokens to the ranks of their experts, and results back.

    ``axis`` are the ranks that experts are split over, as ``owners`` says (an int: equal runs of that many consecutive
    experts); ``etp`` those that hold parts of the same experts, each of width F / etp. Ranks of both hold different
    tokens. Every rank runs the same collectives, also with no rows at all. Rows are addressed to slots, not to experts:
    a rank's slots are consecutive numbers whatever experts it owns.
    """

    def __init__(
        self,
        owners: Owners | int,
        axis: Axis = LOCAL,
        backend: str = "auto",
        *,
        etp: Axis = LOCAL,
        config: DispatchConfig | None = None,
        capacity: CapacityConfig | None = None,
    ) -> None:
        self.owners = Owners.consecutive(owners, axis.size) if isinstance(owners, int) else owners
        #: slots of each rank, those of all ranks, and the experts that fill this rank's
        self.slots, self.all_slots = self.owners.slots, self.owners.slots * axis.size
        self.experts_here = len(self.owners.experts_of(axis.rank))
        self.axis, self.etp, self.backend = axis, etp, backend
        self.config = DispatchConfig() if config is None else config
        self.capacity = capacity
        self.there, self.home = WIRES[self.config.wire]
        self.sizes_of: SizesOf = equal_sizes if self.config.equal_tokens else exchange_sizes

    @abstractmethod
    def send(self, x_TD: Tensor, routing: Routing) -> Any:
        """Let the rows of ``x_TD`` leave for the ranks of their experts; returns what :meth:`finish` needs.

        What the caller computes between the two overlaps with the exchange.
        """

    @abstractmethod
    def finish(self, flight: Any, experts: Experts) -> Tensor:
        """Wait for the rows, compute, bring results home: each token's weighted sum over its experts, [T, D]."""

    def compute(
        self, rows_SD: Tensor, weights_SK: Tensor, ids_SK: Tensor, experts: Experts, sizes_of: SizesOf
    ) -> Tensor:
        """Each row's weighted sum over this rank's experts, whose ids are their slots from 0 (-1: no choice): [S, D].

        Under expert tensor parallelism all ranks' rows meet on every rank, and the partial results are summed on the
        way home; ``sizes_of`` finds how many each rank has.
        """
        sizes = sizes_of(rows_SD, self.etp)
        if self.etp.size > 1:
            sources = (rows_SD, weights_SK, ids_SK.int())
            rows_SD, weights_SK, ids_SK = (gather_rows(t, sizes, self.etp) for t in sources)
        ids_SK = ids_SK.long()
        if self.experts_here < self.slots:  # rows for slots that no expert fills are padding
            ids_SK = torch.where(ids_SK < self.experts_here, ids_SK, -1)
        order = sort_by_expert(ids_SK, self.experts_here, backend=self.backend)
        y_SD = experts(rows_SD, DispatchPlan(weights_SK, order))
        return reduce_scatter_rows(y_SD, sizes, self.etp)


def as_computed(x_TD: Tensor) -> Tensor:
    """Rows travel in the dtype in which they will be computed."""
    device = x_TD.device.type
    return x_TD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x_TD
