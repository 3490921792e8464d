"""Exchange by DeepSeek's kernels (package deep_ep), which send a token to each rank once, over NVLink and RDMA.

T tokens, D hidden, K top-k, S source rows received.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..collectives import Axis, exchange_sizes, once
from ..placement import Owners
from ..types import Experts, Routing
from .all_to_all import AllToAllDispatcher
from .base import Dispatcher, as_computed


def deepep(owners: Owners | int, axis: Axis, *args: Any, **kwargs: Any) -> Dispatcher:
    """A :class:`DeepEPDispatcher` where package deep_ep can be imported; else, with a warning, the all-to-all."""
    try:
        buffer_class = importlib.import_module("deep_ep").Buffer
    except (ImportError, AttributeError) as error:
        warnings.warn(f"dispatch.name='deepep': {error}; 'all_to_all' takes its place", stacklevel=2)
        return AllToAllDispatcher(owners, axis, *args, **kwargs)
    return DeepEPDispatcher(buffer_class, owners, axis, *args, **kwargs)


class DeepEPDispatcher(Dispatcher):
    """The high-throughput kernels of ``deep_ep.Buffer``. Rows are bf16; sums of results are made in its kernels."""

    def __init__(self, buffer_class: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.buffer_class = buffer_class

    def send(self, x_TD: Tensor, routing: Routing) -> Flight:
        x_TD = as_computed(x_TD)
        if x_TD.dtype != torch.bfloat16:
            raise ValueError(
                f"dispatch.name='deepep': rows are {x_TD.dtype}; it sends bf16 alone: use autocast to bf16"
            )
        trip = _Trip(buffer_for(self.buffer_class, self.axis, x_TD), self.all_slots)
        slots_TK = self.owners.to_slots(routing.ids_TK)
        return Flight(trip, *_ToExperts.apply(x_TD, routing.weights_TK.float(), slots_TK, trip))

    def finish(self, flight: Flight, experts: Experts) -> Tensor:
        flight.trip.arrived.current_stream_wait()
        y_SD = self.compute(flight.rows_SD, flight.weights_SK, flight.slots_SK, experts, exchange_sizes)
        return _Home.apply(y_SD, flight.trip)


class Flight(NamedTuple):
    """Rows that have arrived once the trip's event is over."""

    trip: _Trip
    rows_SD: Tensor
    weights_SK: Tensor
    slots_SK: Tensor


class _Trip:
    """One forward's exchange: the handle by which results, and gradients, find their way."""

    def __init__(self, buffer: Any, slots: int) -> None:
        self.buffer, self.slots = buffer, slots
        self.handle: Any = None
        self.arrived: Any = None

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> tuple:
        """(rows, weights, ids counted from this rank's first expert, handle, event)."""
        per_rank, per_node, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(ids_TK, self.slots)
        rows, ids, weights, _, handle, event = self.buffer.dispatch(
            x_TD.contiguous(),
            topk_idx=ids_TK,
            topk_weights=weights_TK.contiguous(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            previous_event=self.buffer.capture(),
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        return rows, weights, ids, handle, event


class _ToExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, trip: _Trip) -> tuple[Tensor, ...]:
        ctx.trip = trip
        rows, weights, ids, trip.handle, trip.arrived = once(lambda: trip.dispatch(x_TD, weights_TK, ids_TK))
        ids = ids.detach()
        ctx.mark_non_differentiable(ids)
        return rows.detach(), weights.detach(), ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor, grad_SK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        trip = ctx.trip
        grad_x, grad_weights, _ = trip.buffer.combine(
            grad_SD.contiguous(), trip.handle, topk_weights=grad_SK.float().contiguous()
        )
        return grad_x, grad_weights, None, None


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        return once(lambda: trip.buffer.combine(y_SD.contiguous(), trip.handle)[0]).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.trip.buffer.dispatch(grad_TD.contiguous(), handle=ctx.trip.handle)[0], None


_buffers: dict[Any, Any] = {}


def buffer_for(buffer_class: Any, axis: Axis, x_TD: Tensor) -> Any:
    """The buffer of the axis's group, one for all layers, made anew where rows have become too long for it."""
    row_bytes, size = x_TD.shape[1] * x_TD.element_size(), axis.size
    configs = (buffer_class.get_dispatch_config(size), buffer_class.get_combine_config(size))
    nvlink = max(config.get_nvl_buffer_size_hint(row_bytes, size) for config in configs)
    rdma = max(config.get_rdma_buffer_size_hint(row_bytes, size) for config in configs)
    buffer = _buffers.get(axis.group)
    if buffer is None or buffer.num_nvl_bytes < nvlink or buffer.num_rdma_bytes < rdma:
        buffer = _buffers[axis.group] = buffer_class(axis.group, nvlink, rdma)
    return buffer
