"""Scores to expert ids: [T, E] to int64 [T, K], best first. Nothing here is differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def top_k(scores_TE: Tensor, k: int) -> Tensor:
    """The K highest scores; of equal ones the expert with the lower index (torch.topk leaves that open)."""
    return torch.sort(scores_TE, dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
