"""Plans an all-to-all, whole or in chunks: which row a rank sends to which slot.

T tokens, K top-k, P ranks, e slots per rank, C chunks, X rows sent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.sort_by_expert import ExpertOrder, sort_by_expert
from ..collectives import Axis, equal_sizes, exchange_counts, exchange_sizes, exchange_slots, splits
from ..config import CapacityConfig
from .base import SizesOf


@dataclass(frozen=True)
class ExchangeChunk:
    """The splits of one all-to-all."""

    sent: list[int]
    received: list[int]
    #: int64 [S, 1], slot on this rank of each received row
    ids_S1: Tensor


@dataclass(frozen=True)
class ExchangePlan:
    """All rows that this rank sends, sorted by chunk and then by slot (which sorts them by rank too)."""

    #: maps source rows to sent rows; a padded exchange has one more source row, which is empty
    order: ExpertOrder
    #: number of rows sent
    rows: int
    chunks: list[ExchangeChunk]
    #: returns the number of rows of each rank of the etp axis
    sizes_of: SizesOf


def dropless(slots_TK: Tensor, slots: int, axis: Axis, chunks: int, backend: str) -> ExchangePlan:
    """Plan to send exactly the routed rows. The j-th row of a slot goes into chunk j mod C."""
    each = slots // axis.size
    order = sort_by_expert(slots_TK, slots, backend=backend)
    if chunks > 1:
        place_TK = order.inverse_SK - order.offsets_E[slots_TK.clamp_min(0)]
        queue_TK = torch.where(slots_TK >= 0, place_TK % chunks * slots + slots_TK, -1)
        order = sort_by_expert(queue_TK, chunks * slots, backend=backend)
    counts_PCe = order.offsets_E.diff().view(chunks, axis.size, each).transpose(0, 1).contiguous()
    received_PCe = exchange_counts(counts_PCe, axis)
    sent, received = splits(counts_PCe.sum(2).T.flatten(), received_PCe.sum(2).T.flatten(), axis)
    slot_of = torch.arange(each, device=slots_TK.device).repeat(axis.size)
    parts = []
    for c in range(chunks):
        part = slice(c * axis.size, (c + 1) * axis.size)
        counts = received_PCe[:, c].flatten()
        ids_S1 = slot_of.repeat_interleave(counts, output_size=sum(received[part]))[:, None]
        parts.append(ExchangeChunk(sent[part], received[part], ids_S1))
    return ExchangePlan(order, sum(sent), parts, exchange_sizes)


def rows_per_expert(capacity: CapacityConfig, tokens: int, top_k: int, num_experts: int) -> int:
    """Return the rows per expert of a padded exchange, without reading the device."""
    limit = tokens if capacity.max_tokens is None else capacity.max_tokens
    if tokens > limit:
        raise ValueError(f"capacity.max_tokens={limit}: this forward has {tokens} tokens; set it to the maximum")
    return min(math.ceil(limit * (capacity.factor * top_k) / num_experts), limit * top_k)


def padded(
    slots_TK: Tensor, slots: int, axis: Axis, chunks: int, backend: str, capacity: CapacityConfig, num_experts: int
) -> ExchangePlan:
    """Plan to send the same number of rows to every slot; rows that no kept choice fills are empty."""
    each, device = slots // axis.size, slots_TK.device
    tokens, top_k = slots_TK.shape
    per_chunk = math.ceil(rows_per_expert(capacity, tokens, top_k, num_experts) / chunks)
    order = _filled(slots_TK, slots, chunks, per_chunk, backend)
    slot_of = torch.arange(each, device=device).repeat_interleave(per_chunk).repeat(axis.size)[:, None]
    sizes = [each * per_chunk] * axis.size
    chunk = ExchangeChunk(sizes, sizes, slot_of)
    return ExchangePlan(order, chunks * slots * per_chunk, [chunk] * chunks, equal_sizes)


def equal(slots_TK: Tensor, slots: int, axis: Axis, chunks: int, backend: str) -> ExchangePlan:
    """Plan to send T K / P rows to every rank, so that no rank asks for sizes; the slot of each row travels with it.

    Rows of masked tokens are empty.
    """
    each, ranks = slots // axis.size, axis.size
    rank_TK = torch.where(slots_TK >= 0, slots_TK // each, -1)
    per_chunk = math.ceil(slots_TK.numel() / ranks / chunks)
    order = _filled(rank_TK, ranks, chunks, per_chunk, backend)
    rows = chunks * ranks * per_chunk
    slot_of = torch.cat((slots_TK.flatten() % each, slots_TK.new_full((1,), -1))).int()
    sent_PCR = slot_of[order.order_R[:rows]].view(chunks, ranks, per_chunk).transpose(0, 1)
    received_PCR = exchange_slots(sent_PCR, axis)
    sizes = [per_chunk] * ranks
    parts = [ExchangeChunk(sizes, sizes, received_PCR[:, c].reshape(-1, 1)) for c in range(chunks)]
    return ExchangePlan(order, rows, parts, equal_sizes)


def _filled(bins_TK: Tensor, bins: int, chunks: int, per_chunk: int, backend: str) -> ExpertOrder:
    """Order choices by chunk and bin, with ``per_chunk`` rows for each of both; those that no choice fills are empty.

    An extra empty source row fills them. An extra sent row, which is ignored, takes the choices that are not sent.
    """
    (tokens, top_k), device, rows = bins_TK.shape, bins_TK.device, chunks * bins * per_chunk
    order = sort_by_expert(bins_TK, bins, backend=backend)
    place_TK = order.inverse_SK - order.offsets_E[bins_TK.clamp_min(0)]
    row_TK = (place_TK % chunks * bins + bins_TK) * per_chunk + place_TK // chunks
    row_TK = torch.where(bins_TK >= 0, row_TK, -1)
    empty = tokens * top_k
    order_X = bins_TK.new_full((rows + 1,), empty)
    order_X.scatter_(0, torch.where(row_TK >= 0, row_TK, rows).flatten(), torch.arange(empty, device=device))
    inverse_SK = torch.cat((row_TK, row_TK.new_full((1, top_k), -1)))
    return ExpertOrder(order_X, inverse_SK, torch.arange(chunks * bins + 1, device=device) * per_chunk)
