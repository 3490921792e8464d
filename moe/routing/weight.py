"""How the results of a token's experts are weighed.  T tokens, K top-k."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def plain(log_scores_TK: Tensor, logits_TK: Tensor) -> Tensor:
    """The chosen scores themselves (Switch)."""
    return log_scores_TK.exp()


def normalized(log_scores_TK: Tensor, logits_TK: Tensor) -> Tensor:
    """The chosen scores, divided by their sum."""
    return log_scores_TK.softmax(-1)


def softmax_after_topk(log_scores_TK: Tensor, logits_TK: Tensor) -> Tensor:
    """The softmax of the chosen logits (Mixtral, arXiv 2401.04088)."""
    return logits_TK.softmax(-1)


#: logarithms of the chosen scores [T, K], and the chosen logits [T, K], to weights [T, K], differentiable
WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": plain,
    "normalized": normalized,
    "softmax_after_topk": softmax_after_topk,
}
