"""One stable sort, without host synchronisation on accelerators."""

# S source rows, K choices per row, R = S*K routed rows, E experts.

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import readable
from .types import ExpertOrder, check_range


def sort_by_expert(ids_SK: Tensor, num_experts: int) -> ExpertOrder:
    ids_R = ids_SK.reshape(-1)
    if not readable(ids_R):
        dropped_R = (ids_R < 0) | (ids_R >= num_experts)
        order_R, inverse_R, offsets_E, _ = _sort(ids_R.masked_fill(dropped_R, num_experts), num_experts)
        return ExpertOrder(order_R, inverse_R.masked_fill_(dropped_R, -1).view(ids_SK.shape), offsets_E)
    order_R, inverse_R, offsets_E, sorted_R = _sort(ids_R, num_experts)
    dropped, *_, end = offsets_E.tolist()
    if dropped or end < len(ids_R):
        check_range(int(sorted_R[0]), int(sorted_R[-1]), num_experts)
        # dropped rows came first, and have to be the last
        order_R, offsets_E = order_R.roll(-dropped), offsets_E - dropped
        inverse_R = (inverse_R - dropped).clamp_min_(-1)
    return ExpertOrder(order_R, inverse_R.view(ids_SK.shape), offsets_E)


def _sort(ids_R: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the order, its inverse, where each expert's rows begin, [E + 1], and the sorted ids."""
    sorted_R, order_R = torch.sort(ids_R, stable=True)
    offsets_E = torch.searchsorted(sorted_R, torch.arange(num_experts + 1, device=ids_R.device))
    rows_R = torch.arange(ids_R.shape[0], device=ids_R.device)
    return order_R, rows_R.scatter(0, order_R, rows_R), offsets_E, sorted_R
