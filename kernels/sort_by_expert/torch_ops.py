"""One stable sort, without host synchronisation on accelerators."""

# S source rows, K choices per row, R = S*K routed rows, E experts.

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import readable
from .types import ExpertOrder


def sort_by_expert(ids_SK: Tensor, num_experts: int, all_kept: bool = False) -> ExpertOrder:
    """Sort as the public op does. ``all_kept`` promises that no choice is dropped."""
    ids_R = ids_SK.reshape(-1)
    if not all_kept:
        dropped_R = ids_R < 0
        if not readable(ids_R):  # otherwise the public op has already refused ids that are too large
            dropped_R |= ids_R >= num_experts
        ids_R = ids_R.masked_fill(dropped_R, num_experts)
    sorted_R, order_R = torch.sort(ids_R, stable=True)
    offsets_E = torch.searchsorted(sorted_R, torch.arange(num_experts + 1, device=ids_R.device))
    rows_R = torch.arange(ids_R.numel(), device=ids_R.device)
    inverse_R = rows_R.scatter(0, order_R, rows_R)
    if not all_kept:
        inverse_R.masked_fill_(dropped_R, -1)
    return ExpertOrder(order_R, inverse_R.view(ids_SK.shape), offsets_E)
