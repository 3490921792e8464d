"""Weights of the chosen experts: (logits_TE, scores_TE, ids_TK) to [T, K], differentiable."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def raw(logits_TE: Tensor, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """The scores themselves (Switch, DeepSeekMoE)."""
    return scores_TE.gather(1, ids_TK)


def normalized(logits_TE: Tensor, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """The scores over their sum (GShard, Qwen3, DeepSeek-V3)."""
    chosen_TK = scores_TE.gather(1, ids_TK)
    return chosen_TK / chosen_TK.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(scores_TE.dtype).tiny)


def softmax_after_topk(logits_TE: Tensor, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """The softmax over the chosen logits alone (Mixtral, arXiv 2401.04088)."""
    return logits_TE.gather(1, ids_TK).softmax(dim=-1)


WEIGHTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "raw": raw,
    "normalized": normalized,
    "softmax_after_topk": softmax_after_topk,
}
