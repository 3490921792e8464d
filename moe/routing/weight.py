"""Weight functions: compute the gate weights of a token's chosen experts.  T tokens, K top-k."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def plain(log_scores_TK: Tensor, logits_TK: Tensor) -> Tensor:
    """Use the chosen scores unchanged (Switch)."""
    return log_scores_TK.exp()


def normalized(log_scores_TK: Tensor, logits_TK: Tensor) -> Tensor:
    """Divide the chosen scores by their sum."""
    return log_scores_TK.softmax(-1)


def softmax_after_topk(log_scores_TK: Tensor, logits_TK: Tensor) -> Tensor:
    """Take the softmax of the chosen logits (Mixtral, arXiv 2401.04088)."""
    return logits_TK.softmax(-1)


#: name -> function from (log of chosen scores [T, K], chosen logits [T, K]) to gate weights [T, K], differentiable
WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": plain,
    "normalized": normalized,
    "softmax_after_topk": softmax_after_topk,
}
