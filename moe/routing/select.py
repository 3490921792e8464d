"""Select functions: choose the experts of each token.  T tokens, E experts, K top-k, G groups."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(wanted_TE: Tensor, k: int) -> Tensor:
    """Choose the k highest scores, best first; ties by the lower expert index."""
    return wanted_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()


def group_limited(wanted_TE: Tensor, k: int, groups: int, kept_groups: int) -> Tensor:
    """Choose the k highest scores within the best ``kept_groups`` of ``groups`` groups of consecutive experts.

    Groups are ranked by the sum of their two highest scores (DeepSeek-V3, arXiv 2412.19437).
    """
    size = wanted_TE.shape[1] // groups
    worth_TG = wanted_TE.unflatten(1, (groups, size)).topk(min(2, size), dim=-1).values.sum(-1)
    kept_TG = torch.zeros_like(worth_TG, dtype=torch.bool).scatter_(1, top_k(worth_TG, kept_groups), True)
    return top_k(wanted_TE.masked_fill(~kept_TG.repeat_interleave(size, dim=1), float("-inf")), k)
