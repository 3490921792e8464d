"""What all dispatchers have in common.  T tokens, D hidden, K top-k, S source rows of an expert's rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels.sort_by_expert import sort_by_expert
from ..collectives import LOCAL, Axis, equal_sizes, exchange_sizes, gather_rows, reduce_scatter_rows
from ..config import CapacityConfig, DispatchConfig
from ..types import DispatchPlan, Experts, Routing
from .wire import WIRES

#: (rows, axis) to the number of rows on each rank of the axis
SizesOf = Callable[[Tensor, Axis], list[int]]


def nothing() -> None:
    """Nothing to do while rows travel."""


class Dispatcher(ABC):
    """Brings tokens to the ranks of their experts, and results back.

    ``axis`` are the ranks that experts are split over; ``etp`` those that hold parts of the same experts, each of width
    F / etp. Ranks of both hold different tokens. Every rank runs the same collectives, also with no rows at all.
    """

    def __init__(
        self,
        num_experts: int,
        axis: Axis = LOCAL,
        backend: str = "auto",
        *,
        etp: Axis = LOCAL,
        config: DispatchConfig | None = None,
        capacity: CapacityConfig | None = None,
    ) -> None:
        if num_experts % axis.size:
            raise ValueError(f"num_experts={num_experts}: must be divisible by expert parallel = {axis.size} ranks")
        self.num_experts, self.experts_here = num_experts, num_experts // axis.size
        self.axis, self.etp, self.backend = axis, etp, backend
        self.config = DispatchConfig() if config is None else config
        self.capacity = capacity
        self.there, self.home = WIRES[self.config.wire]
        self.sizes_of: SizesOf = equal_sizes if self.config.equal_tokens else exchange_sizes

    @abstractmethod
    def __call__(
        self, x_TD: Tensor, routing: Routing, experts: Experts, meanwhile: Callable[[], object] = nothing
    ) -> Tensor:
        """Each token's weighted sum over the experts it chose: [T, D].

        ``meanwhile`` is work of the caller that may be called once while rows travel.
        """

    def compute(
        self, rows_SD: Tensor, weights_SK: Tensor, ids_SK: Tensor, experts: Experts, sizes_of: SizesOf
    ) -> Tensor:
        """Each row's weighted sum over this rank's experts, whose ids count from 0 (-1: no choice): [S, D].

        Under expert tensor parallelism all ranks' rows meet on every rank, and the partial results are summed on the
        way home; ``sizes_of`` finds how many each rank has.
        """
        sizes = sizes_of(rows_SD, self.etp)
        if self.etp.size > 1:
            sources = (rows_SD, weights_SK, ids_SK.int())
            rows_SD, weights_SK, ids_SK = (gather_rows(t, sizes, self.etp) for t in sources)
        order = sort_by_expert(ids_SK.long(), self.experts_here, backend=self.backend)
        y_SD = experts(rows_SD, DispatchPlan(weights_SK, order))
        return reduce_scatter_rows(y_SD, sizes, self.etp)


def as_computed(x_TD: Tensor) -> Tensor:
    """Rows travel in the dtype in which they will be computed."""
    device = x_TD.device.type
    return x_TD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x_TD
