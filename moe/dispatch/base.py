"""The base class of dispatchers.  T tokens, D hidden, K top-k, S source rows on an expert's rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...kernels.sort_by_expert import sort_by_expert
from ..collectives import LOCAL, Axis, all_gather_rows, equal_sizes, exchange_sizes, reduce_scatter_rows
from ..config import CapacityConfig, DispatchConfig
from ..placement import Owners
from ..types import DispatchPlan, Experts, Routing
from .codecs import WIRES

#: (rows, axis) -> number of rows on each rank of the axis
SizesOf = Callable[[Tensor, Axis], list[int]]


class Dispatcher(ABC):
    """Sends tokens to the ranks of their experts, and combines the results.

    ``axis`` has the ranks that experts are distributed over. ``owners`` says which rank owns which expert; an int is
    the number of experts, in equal runs of consecutive experts. ``etp`` has the ranks that split the same experts into
    parts of width F / etp. The ranks of both axes hold different tokens. Every rank runs the same collectives, even
    with no rows. Rows are addressed to slots, not experts: a rank's slots are consecutive numbers, whatever experts it
    owns.
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
        #: numbers of slots per rank and in total, and of experts that this rank owns
        self.slots, self.all_slots = self.owners.slots, self.owners.slots * axis.size
        self.experts_here = len(self.owners.experts_of(axis.rank))
        self.axis, self.etp, self.backend = axis, etp, backend
        self.config = DispatchConfig() if config is None else config
        self.capacity = capacity
        self.dispatch_wire, self.combine_wire = WIRES[self.config.wire]
        self.sizes_of: SizesOf = equal_sizes if self.config.equal_tokens else exchange_sizes

    @abstractmethod
    def send(self, x_TD: Tensor, routing: Routing) -> Any:
        """Start to send the rows of ``x_TD`` to the ranks of their experts; return the argument of :meth:`finish`.

        Whatever the caller computes before :meth:`finish` overlaps with the exchange.
        """

    @abstractmethod
    def finish(self, flight: Any, experts: Experts) -> Tensor:
        """Wait for the rows, run the experts, and combine: return each token's weighted sum over its experts [T, D]."""

    def compute(
        self, rows_SD: Tensor, weights_SK: Tensor, ids_SK: Tensor, experts: Experts, sizes_of: SizesOf
    ) -> Tensor:
        """Return each row's weighted sum over this rank's experts [S, D].

        ``ids_SK`` has this rank's slots, counted from 0; -1 means no choice. Under expert tensor parallelism, the rows
        of all etp ranks are gathered on each, and the partial results are reduce-scattered; ``sizes_of`` returns each
        rank's number of rows.
        """
        sizes = sizes_of(rows_SD, self.etp)
        if self.etp.size > 1:
            sources = (rows_SD, weights_SK, ids_SK.int())
            rows_SD, weights_SK, ids_SK = (all_gather_rows(t, sizes, self.etp) for t in sources)
        ids_SK = ids_SK.long()
        if self.experts_here < self.slots:  # rows for empty slots are padding
            ids_SK = torch.where(ids_SK < self.experts_here, ids_SK, -1)
        order = sort_by_expert(ids_SK, self.experts_here, backend=self.backend)
        y_SD = experts(rows_SD, DispatchPlan(weights_SK, order))
        return reduce_scatter_rows(y_SD, sizes, self.etp)


def as_computed(x_TD: Tensor) -> Tensor:
    """Cast to autocast's dtype, so that rows are sent in the dtype in which experts compute."""
    device = x_TD.device.type
    return x_TD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x_TD
