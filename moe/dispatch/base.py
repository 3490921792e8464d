"""The base class of dispatchers.  T tokens, D hidden, K top-k, S source rows on an expert's rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ...kernels.sort_by_expert import sort_by_expert
from ..collectives import LOCAL, Axis, equal_sizes, exchange_sizes, reduce_scatter_rows, start_all_gather
from ..config import CapacityConfig, DispatchConfig
from ..placement import Owners
from ..regions import region
from ..types import DispatchPlan, Experts, Routing
from .codecs import WIRES

#: (rows, axis) -> number of rows on each rank of the axis
SizesOf = Callable[[Tensor, Axis], list[int]]


class Holders(Protocol):
    """Where experts can be computed: their owners, or also ranks with replicas."""

    @property
    def slots(self) -> int:
        """Number of slots of every rank."""

    @property
    def num_experts(self) -> int:
        """Number of experts."""

    def experts_of(self, rank: int) -> list[int]:
        """Return the experts that a rank holds, in the order of their slots."""

    def to_slots(self, ids_TK: Tensor) -> Tensor:
        """Map this rank's choices, int64 [T, K], to slot numbers; -1 stays -1."""


class Dispatcher(ABC):
    """Sends tokens to the ranks of their experts, and combines the results.

    ``axis`` has the ranks that experts are distributed over. ``owners`` says which rank owns which expert; an int is
    the number of experts, in equal runs of consecutive experts. ``etp`` has the ranks that split the same experts into
    parts of width F / etp. The ranks of both axes hold different tokens. Every rank runs the same collectives, even
    with no rows. Rows are addressed to slots, not experts: a rank's slots are consecutive numbers, whatever experts it
    owns. With ``even``, all ranks have equally many tokens, and every token has equally many choices on each owner,
    unless it is masked.
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
        even: bool = False,
    ) -> None:
        self.axis, self.etp, self.backend = axis, etp, backend
        self.config = DispatchConfig() if config is None else config
        self.capacity, self.even = capacity, even
        self.address(Owners.consecutive(owners, axis.size) if isinstance(owners, int) else owners)
        self.dispatch_wire, self.combine_wire = WIRES[self.config.wire]
        self.sizes_of: SizesOf = equal_sizes if self.config.equal_tokens else exchange_sizes

    def address(self, holders: Holders) -> None:
        """Send rows to these holders from now on. All ranks must do this before the same forward."""
        #: says to which slot of which rank a choice goes
        self.holders = holders
        #: numbers of slots per rank and in total; experts that this rank holds, and their number
        self.slots, self.all_slots = holders.slots, holders.slots * self.axis.size
        self.here = tuple(holders.experts_of(self.axis.rank))
        self.experts_here = len(self.here)

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
        sizes = [len(rows_SD)]
        if self.etp.size > 1:
            sizes = sizes_of(rows_SD, self.etp)
            gathered = start_all_gather(rows_SD, sizes, self.etp, extras=(weights_SK, ids_SK.int()))
            rows_SD, weights_SK, ids_SK = gathered.wait_all()
        ids_SK = ids_SK.long()
        if not self.experts_here:
            y_SD = _Nothing.apply(rows_SD, weights_SK, *getattr(experts, "parameters", tuple)())
            return reduce_scatter_rows(y_SD, sizes, self.etp)
        if self.experts_here < self.slots:  # rows for empty slots are padding
            ids_SK = torch.where(ids_SK < self.experts_here, ids_SK, -1)
        order = sort_by_expert(ids_SK, self.experts_here, backend=self.backend)
        with region("experts"):
            y_SD = experts(rows_SD, DispatchPlan(weights_SK, order, self.here))
        return y_SD if self.etp.size == 1 else reduce_scatter_rows(y_SD, sizes, self.etp)


class _Nothing(torch.autograd.Function):
    """Computes zeros on a rank without experts. All ranks run the same backward, so nothing is cut off."""

    @staticmethod
    def forward(ctx: Any, rows_SD: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(rows_SD, *others)
        return torch.zeros_like(rows_SD)

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(t) for t in ctx.saved_tensors)


def as_computed(x_TD: Tensor) -> Tensor:
    """Cast to autocast's dtype, so that rows are sent in the dtype in which experts compute."""
    device = x_TD.device.type
    return x_TD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x_TD
