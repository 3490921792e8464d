"""How logits become scores.  T tokens, E experts.

Scores are computed as logarithms, so that none underflows: the quotient of two tiny scores, which is what normalised
weights and probabilities are made of, is a difference of logarithms.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def softmax(logits_TE: Tensor) -> Tensor:
    """A token's scores sum to 1 (Switch, Mixtral, Qwen)."""
    return logits_TE.log_softmax(-1)


def sigmoid(logits_TE: Tensor) -> Tensor:
    """Each expert has a score of its own (DeepSeek-V3, arXiv 2412.19437)."""
    return F.logsigmoid(logits_TE)


#: logits [T, E] to the logarithms of the scores [T, E], differentiable
SCORES: dict[str, Callable[[Tensor], Tensor]] = {"softmax": softmax, "sigmoid": sigmoid}
