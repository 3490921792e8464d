"""What a rank sends where: which row stands at which place of an all-to-all, in one piece or in chunks.

T tokens, K top-k, E experts, e experts per rank, P ranks, C chunks, X rows sent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.sort_by_expert import ExpertOrder, sort_by_expert
from ..collectives import Axis, equal_sizes, exchange_counts, exchange_sizes, splits
from ..config import CapacityConfig
from ..types import Routing
from .base import SizesOf


@dataclass(frozen=True)
class Chunk:
    """One all-to-all."""

    sent: list[int]
    received: list[int]
    #: int64 [S, 1], the expert of each row received, counted from this rank's first
    ids_S1: Tensor


@dataclass(frozen=True)
class Manifest:
    """All that leaves this rank, ordered by chunk, then by expert and with that by rank."""

    #: rows of x, and perhaps one more, which is empty, to rows sent
    order: ExpertOrder
    rows: int
    chunks: list[Chunk]
    #: what tells how many rows the other ranks of the etp axis have
    sizes_of: SizesOf


def dropless(routing: Routing, num_experts: int, axis: Axis, chunks: int, backend: str) -> Manifest:
    """Exactly the rows that were routed; the j-th of an expert's rows travels in chunk j mod C."""
    ids_TK, each = routing.ids_TK, num_experts // axis.size
    order = sort_by_expert(ids_TK, num_experts, backend=backend)
    if chunks > 1:
        place_TK = order.inverse_SK - order.offsets_E[ids_TK.clamp_min(0)]
        queue_TK = torch.where(ids_TK >= 0, place_TK % chunks * num_experts + ids_TK, -1)
        order = sort_by_expert(queue_TK, chunks * num_experts, backend=backend)
    counts_PCe = order.offsets_E.diff().view(chunks, axis.size, each).transpose(0, 1).contiguous()
    received_PCe = exchange_counts(counts_PCe, axis)
    sent, received = splits(counts_PCe.sum(2).T.flatten(), received_PCe.sum(2).T.flatten(), axis)
    expert_of = torch.arange(each, device=ids_TK.device).repeat(axis.size)
    parts = []
    for c in range(chunks):
        part = slice(c * axis.size, (c + 1) * axis.size)
        counts = received_PCe[:, c].flatten()
        ids_S1 = expert_of.repeat_interleave(counts, output_size=sum(received[part]))[:, None]
        parts.append(Chunk(sent[part], received[part], ids_S1))
    return Manifest(order, sum(sent), parts, exchange_sizes)


def rows_per_expert(capacity: CapacityConfig, tokens: int, top_k: int, num_experts: int) -> int:
    """The rows that a padded exchange has for each expert, from what the host knows."""
    limit = tokens if capacity.max_tokens is None else capacity.max_tokens
    if tokens > limit:
        raise ValueError(f"capacity.max_tokens={limit}: this forward has {tokens} tokens; raise it to the most")
    return math.ceil(limit * (capacity.factor * top_k) / num_experts)


def padded(
    routing: Routing, num_experts: int, axis: Axis, chunks: int, backend: str, capacity: CapacityConfig
) -> Manifest:
    """The same number of rows for every expert, empty where fewer were routed (and kept: see ``Capacity``)."""
    ids_TK, each = routing.ids_TK, num_experts // axis.size
    tokens, top_k = ids_TK.shape
    per_chunk = math.ceil(rows_per_expert(capacity, tokens, top_k, num_experts) / chunks)
    rows = chunks * num_experts * per_chunk
    order = sort_by_expert(ids_TK, num_experts, backend=backend)
    place_TK = order.inverse_SK - order.offsets_E[ids_TK.clamp_min(0)]
    slot_TK = (place_TK % chunks * num_experts + ids_TK) * per_chunk + place_TK // chunks
    slot_TK = torch.where(ids_TK >= 0, slot_TK, -1)
    # one more source row, which is empty, fills the slots that no choice takes; one more slot takes dropped choices
    empty = tokens * top_k
    order_X = ids_TK.new_full((rows + 1,), empty)
    order_X.scatter_(0, torch.where(slot_TK >= 0, slot_TK, rows).flatten(), torch.arange(empty, device=ids_TK.device))
    inverse_SK = torch.cat((slot_TK, slot_TK.new_full((1, top_k), -1)))
    offsets_E = torch.arange(chunks * num_experts + 1, device=ids_TK.device) * per_chunk
    expert_of = torch.arange(each, device=ids_TK.device).repeat_interleave(per_chunk).repeat(axis.size)[:, None]
    even = [each * per_chunk] * axis.size
    return Manifest(
        ExpertOrder(order_X, inverse_SK, offsets_E), rows, [Chunk(even, even, expert_of)] * chunks, equal_sizes
    )
