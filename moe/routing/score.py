"""Score functions: map logits to scores.  T tokens, E experts.

They return logarithms of the scores, so that tiny scores do not underflow: quotients of scores, as in normalised
weights, are computed as differences of logarithms.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def softmax(logits_TE: Tensor) -> Tensor:
    """Softmax over the experts: a token's scores sum to 1 (Switch, Mixtral, Qwen)."""
    return logits_TE.log_softmax(-1)


def sigmoid(logits_TE: Tensor) -> Tensor:
    """Sigmoid: each expert's score is independent of the others (DeepSeek-V3, arXiv 2412.19437)."""
    return F.logsigmoid(logits_TE)


#: name -> function from logits [T, E] to logarithms of scores [T, E], differentiable
SCORES: dict[str, Callable[[Tensor], Tensor]] = {"softmax": softmax, "sigmoid": sigmoid}


def entropy_sum(log_scores_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    """Return the sum over valid tokens of the entropy of their scores, normalised to sum 1 (arXiv 2403.07652)."""
    log_probs_TE = log_scores_TE.log_softmax(-1)
    entropy_T = -(log_probs_TE.exp() * log_probs_TE).sum(-1)
    return (entropy_T if mask_T is None else torch.where(mask_T, entropy_T, 0.0)).sum()
