"""The reference: Python's own stable sort."""

# S source rows, K choices per row, R = S*K routed rows, E experts.

from __future__ import annotations

import torch
from torch import Tensor

from .types import ExpertOrder


def sort_by_expert(ids_SK: Tensor, num_experts: int) -> ExpertOrder:
    ids = [i if 0 <= i < num_experts else -1 for i in ids_SK.reshape(-1).tolist()]
    order = sorted(range(len(ids)), key=lambda i: num_experts if ids[i] < 0 else ids[i])
    inverse = [-1] * len(ids)
    for row, i in enumerate(order):
        if ids[i] >= 0:
            inverse[i] = row
    offsets = [sum(0 <= e < bound for e in ids) for bound in range(num_experts + 1)]

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=ids_SK.device)

    return ExpertOrder(tensor(order), tensor(inverse).view(ids_SK.shape), tensor(offsets))
