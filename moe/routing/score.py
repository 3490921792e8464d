"""Logits to scores. A score function takes and returns [T, E]; larger is more wanted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def softmax(logits_TE: Tensor) -> Tensor:
    """Scores that compete: they sum to 1 for each token."""
    return logits_TE.softmax(dim=-1)


def sigmoid(logits_TE: Tensor) -> Tensor:
    """Scores that do not compete (DeepSeek-V3, arXiv 2412.19437)."""
    return torch.sigmoid(logits_TE)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {"softmax": softmax, "sigmoid": sigmoid}


def probabilities(scores_TE: Tensor) -> Tensor:
    """Scores made to sum to 1, as the balance loss wants them; softmax scores already do."""
    return scores_TE / scores_TE.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(scores_TE.dtype).tiny)
