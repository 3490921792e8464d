"""Dispatch by all-to-all within a memory budget: a rank that would receive too many rows gets them in parts.

T tokens, K top-k, D hidden, P ranks, e slots per rank, C parts, X rows sent, S rows received.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...kernels.permute import combine, permute
from ...kernels.sort_by_expert import sort_by_expert
from ..collectives import Axis, exchange_counts, exchange_sizes, gather_counts, keeping, on_host, start_exchange
from ..config import MoEConfig
from ..types import Experts, Routing
from .all_to_all import AllToAllDispatcher, AllToAllFlight
from .base import as_computed
from .exchange_plan import ExchangeChunk, ExchangePlan

#: bytes of a received row's gate weight, with which the row is padded to a multiple of 16, and of its slot
ROUTING_BYTES = 16 + 8


class OverBudgetError(MemoryError):
    """The rows of a layer do not fit into ``moe.dispatch.memory_mb``. Raised on every rank that exchanges rows."""


@dataclass(frozen=True)
class Budget:
    """The memory that the rows of one layer may take on a rank, and what a row takes there."""

    #: in MiB
    limit: int
    #: numbers per row: the row, its result, and what the experts keep for the backward
    values: int
    #: whether to stop instead of computing in parts
    stops: bool

    @staticmethod
    def of(config: MoEConfig, etp: int) -> Budget:
        assert config.dispatch.memory_mb is not None
        width = (3 if config.gated else 2) * max(config.expert_widths) // etp
        stops = config.dispatch.over_memory == "stop"
        return Budget(config.dispatch.memory_mb, 2 * config.hidden_size + width, stops)

    def bytes_of(self, rows: int, item: int) -> int:
        """Return the bytes that ``rows`` take if a number has ``item`` bytes."""
        return rows * (self.values * item + ROUTING_BYTES)

    def parts(self, loads: list[Load], item: int) -> int:
        """Return in how many parts every rank must compute, so that no rank exceeds the budget; 0 if none suffices.

        Part c has the rows c, c + C, ... of each expert from each rank: at most (rows - runs) / C + runs rows.
        """
        fits = (self.limit << 20) // self.bytes_of(1, item)
        if all(load.rows <= fits for load in loads):
            return 1
        if self.stops or any(min(load.rows, load.runs) >= fits for load in loads if load.rows > fits):
            return 0
        return max(math.ceil((load.rows - load.runs) / (fits - load.runs)) for load in loads if load.rows > fits)


class Load(NamedTuple):
    """What a rank is about to receive."""

    rows: int
    #: rows of one expert from one rank are a run
    runs: int
    #: its busiest slot, and the rows of it
    slot: int
    busiest: int


class Survey(NamedTuple):
    """What every rank is about to receive. All ranks that exchange rows have the same loads."""

    order: Any
    received_Pe: Tensor
    sent: list[list[int]]
    received: list[list[int]]
    #: of each rank of the axis; under etp, of the ranks together that gather each other's rows
    loads: list[Load]


def survey(slots_TK: Tensor, slots: int, axis: Axis, etp: Axis, backend: str) -> Survey:
    """Exchange counts, and tell all ranks what each of them will receive, before any row is sent."""
    order = sort_by_expert(slots_TK, slots, backend=backend)
    counts_Pe = order.offsets_E.diff().view(axis.size, -1)
    received_Pe = exchange_counts(counts_Pe, axis)
    rows_e = received_Pe.sum(0)
    load = torch.stack((rows_e.sum(), (received_Pe > 0).sum(), rows_e.argmax(), rows_e.max()))
    loads_APF = gather_counts(gather_counts(load, axis).flatten(), etp).view(etp.size, axis.size, 4)
    sent, received, loads = on_host(counts_Pe, received_Pe, loads_APF)
    together = []
    for p in range(axis.size):
        of_etp = [loads[a][p] for a in range(etp.size)]
        slot, busiest = max(((f[2], f[3]) for f in of_etp), key=lambda pair: pair[1])
        together.append(Load(sum(f[0] for f in of_etp), sum(f[1] for f in of_etp), slot, busiest))
    return Survey(order, received_Pe, sent, received, together)


def plan_of(found: Survey, slots_TK: Tensor, slots: int, parts: int, backend: str) -> ExchangePlan:
    """Plan the exchange in ``parts``: the j-th row of a slot goes into part j mod C."""
    order, (_, each) = found.order, found.received_Pe.shape
    if parts > 1:
        place_TK = order.inverse_SK - order.offsets_E[slots_TK.clamp_min(0)]
        queue_TK = torch.where(slots_TK >= 0, place_TK % parts * slots + slots_TK, -1)
        order = sort_by_expert(queue_TK, parts * slots, backend=backend)
    slot_of = torch.arange(each, device=slots_TK.device).repeat(len(found.received))
    chunks = []
    for c in range(parts):
        up = parts - 1 - c
        sent, received = (
            [sum((n + up) // parts for n in row) for row in rows] for rows in (found.sent, found.received)
        )
        counts = ((found.received_Pe + up) // parts).flatten()
        ids_S1 = slot_of.repeat_interleave(counts, output_size=sum(received))[:, None]
        chunks.append(ExchangeChunk(sent, received, ids_S1))
    return ExchangePlan(order, sum(map(sum, found.sent)), chunks, exchange_sizes)


class BudgetedDispatcher(AllToAllDispatcher):
    """An all-to-all that computes in parts, one after another, if a rank would receive more rows than its budget.

    Every rank knows what all ranks will receive, so all decide alike. Parts are computed once more in the backward,
    because what they keep for it would take as much memory as one exchange of all rows.
    """

    def __init__(self, *args: Any, budget: Budget, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.budget = budget

    def send(self, x_TD: Tensor, routing: Routing) -> AllToAllFlight:
        x_SD, slots_TK = as_computed(x_TD), self.holders.to_slots(routing.ids_TK)
        found = survey(slots_TK, self.all_slots, self.axis, self.etp, self.backend)
        parts = self.budget.parts(found.loads, x_SD.element_size())
        if not parts:
            raise OverBudgetError(self._explain(found.loads, x_SD.element_size()))
        plan = plan_of(found, slots_TK, self.all_slots, parts, self.backend)
        if parts == 1:
            return AllToAllFlight(len(x_TD), plan, self._start(x_SD, routing.weights_TK, plan))
        rows_XD = permute(x_SD, plan.order, plan.rows, backend=self.backend)
        weights_X1 = routing.weights_TK.reshape(-1, 1)[plan.order.order_R[: plan.rows]]
        sizes = [sum(chunk.sent) for chunk in plan.chunks]
        waiting = list(zip(rows_XD.split(sizes), weights_X1.split(sizes), strict=True))
        return AllToAllFlight(len(x_TD), plan, waiting)

    def finish(self, flight: AllToAllFlight, experts: Experts) -> Tensor:
        plan = flight.plan
        if len(plan.chunks) == 1:
            return super().finish(flight, experts)
        weights = [p for p in getattr(experts, "parameters", tuple)() if p.requires_grad]
        home = []
        for chunk, (rows_XD, weights_X1) in zip(plan.chunks, flight.chunks, strict=True):
            run = self._part(chunk, plan, experts)
            home.append(_Again.apply(run, rows_XD, weights_X1, *weights))
        return combine(torch.cat(home), plan.order, backend=self.backend)

    def _part(self, chunk: ExchangeChunk, plan: ExchangePlan, experts: Experts) -> Callable[[Tensor, Tensor], Tensor]:
        def run(rows_XD: Tensor, weights_X1: Tensor) -> Tensor:
            sizes = chunk.sent, chunk.received
            pending = start_exchange(rows_XD, *sizes, self.axis, self.dispatch_wire, (weights_X1,))
            rows_SD, weights_S1 = pending.wait_all()
            y_SD = self.compute(rows_SD, weights_S1, chunk.ids_S1, experts, plan.sizes_of)
            return start_exchange(y_SD, chunk.received, chunk.sent, self.axis, self.combine_wire).wait()

        return run

    def _explain(self, loads: list[Load], item: int) -> str:
        rank = max(range(len(loads)), key=lambda p: loads[p].rows)
        load, mean = loads[rank], sum(other.rows for other in loads) / len(loads)
        needed = math.ceil(self.budget.bytes_of(load.rows, item) / (1 << 20))
        return (
            f"expert-parallel rank {rank} would receive {load.rows} rows ({needed} MiB), {load.rows / mean:.1f} times "
            f"the mean, {load.busiest} of them for expert {self._expert(rank, load.slot)}; "
            f"moe.dispatch.memory_mb={self.budget.limit} "
            + ("allows no such imbalance" if self.budget.stops else "is too little even in parts")
            + "; raise it, lower data.micro_batch, or set moe.capacity"
        )

    def _expert(self, rank: int, slot: int) -> int:
        return self.holders.experts_of(rank)[slot]


class _Again(torch.autograd.Function):
    """Runs a function without keeping anything, and runs it once more in the backward.

    ``parameters`` are the weights that it uses. FSDP2 may not hold them: it gathers weights per forward, and collects
    their gradients itself.
    """

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], rows: Tensor, weights: Tensor, *parameters: Tensor) -> Tensor:
        device = rows.device.type
        ctx.run, ctx.parameters = run, parameters
        ctx.cast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.save_for_backward(rows, weights)
        token = keeping.set(None)  # keeping what the parts receive would keep all rows
        try:
            return run(rows, weights)
        finally:
            keeping.reset(token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        device, dtype, enabled = ctx.cast
        inputs = [saved.detach().requires_grad_() for saved in ctx.saved_tensors]
        token = keeping.set(None)
        try:
            with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
                y = ctx.run(*inputs)
            grads = torch.autograd.grad(y, [*inputs, *ctx.parameters], grad)
        finally:
            keeping.reset(token)
        return None, *grads
