"""Dispatch with DeepSeek's kernels (package deep_ep), which send a token at most once to each rank, by NVLink and RDMA.

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
    """Build a :class:`DeepEPDispatcher`; if deep_ep cannot be imported, warn and build the all-to-all dispatcher."""
    try:
        buffer_class = importlib.import_module("deep_ep").Buffer
    except (ImportError, AttributeError) as error:
        warnings.warn(f"dispatch.name='deepep': {error}; using 'all_to_all' instead", stacklevel=2)
        return AllToAllDispatcher(owners, axis, *args, **kwargs)
    return DeepEPDispatcher(buffer_class, owners, axis, *args, **kwargs)


class DeepEPDispatcher(Dispatcher):
    """Uses the high-throughput kernels of ``deep_ep.Buffer``, which send bf16 rows and sum the results."""

    def __init__(self, buffer_class: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.buffer_class = buffer_class

    def send(self, x_TD: Tensor, routing: Routing) -> DeepEPFlight:
        x_TD = as_computed(x_TD)
        if x_TD.dtype != torch.bfloat16:
            raise ValueError(
                f"dispatch.name='deepep': rows are {x_TD.dtype}, but deep_ep sends only bf16; use autocast to bf16"
            )
        exchange = _DeepEPExchange(buffer_for(self.buffer_class, self.axis, x_TD), self.all_slots)
        slots_TK = self.holders.to_slots(routing.ids_TK)
        return DeepEPFlight(exchange, *_Dispatch.apply(x_TD, routing.weights_TK.float(), slots_TK, exchange))

    def finish(self, flight: DeepEPFlight, experts: Experts) -> Tensor:
        flight.exchange.event.current_stream_wait()
        y_SD = self.compute(flight.rows_SD, flight.weights_SK, flight.slots_SK, experts, exchange_sizes)
        return _Combine.apply(y_SD, flight.exchange)


class DeepEPFlight(NamedTuple):
    """A dispatch that has started. Its tensors are valid once the exchange's event has completed."""

    exchange: _DeepEPExchange
    rows_SD: Tensor
    weights_SK: Tensor
    slots_SK: Tensor


class _DeepEPExchange:
    """The exchange of one forward. ``handle`` routes results and gradients back."""

    def __init__(self, buffer: Any, slots: int) -> None:
        self.buffer, self.slots = buffer, slots
        self.handle: Any = None
        self.event: Any = None

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> tuple:
        """Return (rows, weights, ids from 0 for this rank's first slot, handle, event)."""
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


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, exchange: _DeepEPExchange
    ) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        rows, weights, ids, exchange.handle, exchange.event = once(lambda: exchange.dispatch(x_TD, weights_TK, ids_TK))
        ids = ids.detach()
        ctx.mark_non_differentiable(ids)
        return rows.detach(), weights.detach(), ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor, grad_SK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        exchange = ctx.exchange
        grad_x, grad_weights, _ = exchange.buffer.combine(
            grad_SD.contiguous(), exchange.handle, topk_weights=grad_SK.float().contiguous()
        )
        return grad_x, grad_weights, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, exchange: _DeepEPExchange) -> Tensor:
        ctx.exchange = exchange
        return once(lambda: exchange.buffer.combine(y_SD.contiguous(), exchange.handle)[0]).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.exchange.buffer.dispatch(grad_TD.contiguous(), handle=ctx.exchange.handle)[0], None


_buffers: dict[Any, Any] = {}


def buffer_for(buffer_class: Any, axis: Axis, x_TD: Tensor) -> Any:
    """Return the buffer of the axis's group, which all layers share. Replaces it if it is too small for these rows."""
    row_bytes, size = x_TD.shape[1] * x_TD.element_size(), axis.size
    configs = (buffer_class.get_dispatch_config(size), buffer_class.get_combine_config(size))
    nvlink = max(config.get_nvl_buffer_size_hint(row_bytes, size) for config in configs)
    rdma = max(config.get_rdma_buffer_size_hint(row_bytes, size) for config in configs)
    buffer = _buffers.get(axis.group)
    if buffer is None or buffer.num_nvl_bytes < nvlink or buffer.num_rdma_bytes < rdma:
        buffer = _buffers[axis.group] = buffer_class(axis.group, nvlink, rdma)
    return buffer
