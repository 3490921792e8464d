"""Score, select and weigh in plain torch, for combinations that no fused kernel supports.

T tokens, E experts, K top-k, B sequences.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels.topk_gate import GateOutput, lowest_bias


def compose(
    logits_TE: Tensor,
    *,
    score: Callable[[Tensor], Tensor],
    select: Callable[[Tensor], Tensor],
    weigh: Callable[[Tensor, Tensor], Tensor],
    scale: float = 1.0,
    bias_E: Tensor | None = None,
    mask_T: Tensor | None = None,
    sequences: int = 1,
    ids_TK: Tensor | None = None,
) -> GateOutput:
    """Compute the result of :func:`~equimoe.kernels.topk_gate.topk_gate` from any three functions of this package.

    A token may have fewer than K experts: an id of -1 has a weight of 0 and is not counted.
    """
    log_scores_TE = score(logits_TE)
    if ids_TK is None:
        ids_TK = select(wanted(log_scores_TE, bias_E))
    none_TK, filled_TK = ids_TK < 0, ids_TK.clamp_min(0)
    chosen = (
        values_TE.gather(1, filled_TK).masked_fill(none_TK, -torch.inf) for values_TE in (log_scores_TE, logits_TE)
    )
    weights_TK = weigh(*chosen) * scale
    probs_TE, z_T = log_scores_TE.softmax(-1), logits_TE.logsumexp(-1).square()
    valid_T = torch.ones_like(z_T, dtype=torch.bool) if mask_T is None else mask_T
    probs_TE, z_T = torch.where(valid_T[:, None], probs_TE, 0.0), torch.where(valid_T, z_T, 0.0)
    with torch.no_grad():
        taken_TK = (~none_TK & valid_T[:, None]).long()
        taken_TE = torch.zeros_like(logits_TE, dtype=torch.int64).scatter_add_(1, filled_TK, taken_TK)
    return GateOutput(
        ids_TK=ids_TK,
        weights_TK=weights_TK,
        counts_BE=sum_by_sequence(taken_TE, sequences),
        tokens_B=sum_by_sequence(valid_T.long()[:, None], sequences)[:, 0],
        prob_sums_BE=sum_by_sequence(probs_TE, sequences),
        z_sum=z_T.sum(),
    )


@torch.no_grad()
def wanted(log_scores_TE: Tensor, bias_E: Tensor | None) -> Tensor:
    """Return the values by which experts are chosen, [T, E]: scores plus bias."""
    wanted_TE = log_scores_TE.exp()
    if bias_E is None:
        return wanted_TE
    # an expert with a bias of -inf still comes before one outside of the kept groups
    return wanted_TE + bias_E.to(wanted_TE.dtype).clamp_min(lowest_bias(wanted_TE.dtype))


def sum_by_sequence(values_TX: Tensor, sequences: int) -> Tensor:
    """Sum over each sequence's tokens, [B, X]."""
    tokens, width = values_TX.shape
    return values_TX.reshape(sequences, tokens // sequences, width).sum(1)
