"""The gate in plain torch functions, differentiated by autograd."""

# T tokens, E experts, K top-k, B sequences, N tokens of a sequence, G groups, X choices of a sequence.

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import readable
from .types import FLOOR, LOW, GateOptions, GateOutput, lowest_bias

#: up to this many choices, repeated argmax is faster than sorting on a CPU; on accelerators each launch costs time
_ONE_BY_ONE = 16


def topk_gate(
    logits_TE: Tensor, bias_E: Tensor | None, mask_T: Tensor | None, ids_TK: Tensor | None, options: GateOptions
) -> GateOutput:
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    scores_TE, scale_T1 = _score(logits_TE, options)
    if ids_TK is None:
        ids_TK = choose(scores_TE, scale_T1, bias_E, options)
    weights_TK = _weigh(logits_TE, scores_TE, scale_T1, ids_TK, options)
    probs_TE, z_T = scores_TE / scores_TE.sum(dim=-1, keepdim=True), logits_TE.logsumexp(dim=-1).square()
    if mask_T is not None:
        probs_TE, z_T = torch.where(mask_T[:, None], probs_TE, 0.0), torch.where(mask_T, z_T, 0.0)
    counts_BE, tokens_B = _count(ids_TK, mask_T, options.sequences, logits_TE.shape[1])
    return GateOutput(
        ids_TK=ids_TK,
        weights_TK=weights_TK,
        counts_BE=counts_BE,
        tokens_B=tokens_B,
        prob_sums_BE=probs_TE.reshape(options.sequences, -1, logits_TE.shape[1]).sum(dim=1),
        z_sum=z_T.sum(),
    )


def _score(logits_TE: Tensor, options: GateOptions) -> tuple[Tensor, Tensor | None]:
    """Return each token's scores and the factor [T, 1] that they must be multiplied by; None means 1.

    If all logits of a token are so low that sigmoid equals exp, its scores are scaled up so that none underflows.
    """
    if options.score == "softmax":
        return logits_TE.softmax(dim=-1), None
    peak_T1 = logits_TE.detach().amax(dim=-1, keepdim=True)
    low_T1 = peak_T1 < LOW
    if readable(low_T1) and not low_T1.any():
        return logits_TE.sigmoid(), None
    lift_T1 = torch.where(low_T1 & (peak_T1 > float("-inf")), LOW - peak_T1, 0.0)
    return (logits_TE + lift_T1).sigmoid(), (-lift_T1).exp()


@torch.no_grad()
def choose(scores_TE: Tensor, scale_T1: Tensor | None, bias_E: Tensor | None, options: GateOptions) -> Tensor:
    """Return the chosen experts, best first: int64 [T, K]."""
    wanted_TE = scores_TE
    if bias_E is not None:
        bias_E = bias_E.to(scores_TE.dtype).clamp_min(lowest_bias(scores_TE.dtype))
        wanted_TE = scores_TE + bias_E if scale_T1 is None else torch.addcmul(bias_E, scores_TE, scale_T1)
    if options.kept_groups < options.groups:
        size = scores_TE.shape[1] // options.groups
        worth_TG = wanted_TE.unflatten(1, (options.groups, size)).topk(min(2, size), dim=-1).values.sum(dim=-1)
        kept_TG = torch.zeros_like(worth_TG, dtype=torch.bool)
        kept_TG.scatter_(1, _best(worth_TG, options.kept_groups), True)
        wanted_TE = torch.where(kept_TG.repeat_interleave(size, dim=1), wanted_TE, float("-inf"))
    return _best(wanted_TE, options.k)


def _best(values_TE: Tensor, k: int) -> Tensor:
    """Return the columns of the k highest values of each row, best first: int64 [T, K].

    NaN is highest, and of equal values the lower column comes first (torch.topk does not define this order). At least k
    values of a row must be higher than -inf.
    """
    if not values_TE.is_cpu or k > _ONE_BY_ONE:
        return values_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
    left_TE, best = values_TE.clone(), []
    for _ in range(k):
        best.append(left_TE.argmax(dim=-1, keepdim=True))  # the lowest column of equal values
        left_TE.scatter_(1, best[-1], float("-inf"))
    return torch.cat(best, dim=1)


def _weigh(
    logits_TE: Tensor, scores_TE: Tensor, scale_T1: Tensor | None, ids_TK: Tensor, options: GateOptions
) -> Tensor:
    """Return the chosen experts' weights, [T, K].

    Autograd saves the same tensors whether the choice was given or made here. Recomputation relies on this.
    """
    if options.softmax_after_topk:
        return logits_TE.gather(1, ids_TK).softmax(dim=-1) * options.scale
    chosen_TK = scores_TE.gather(1, ids_TK)
    if not options.normalize:
        return (chosen_TK if scale_T1 is None else chosen_TK * scale_T1) * options.scale
    sum_T1 = chosen_TK.sum(dim=-1, keepdim=True)
    low_T1 = sum_T1.detach() < FLOOR
    if readable(low_T1) and not low_T1.any():
        return chosen_TK / sum_T1 * options.scale
    # replace the inputs of the branch not taken by harmless numbers, because a gradient of 0 times NaN is NaN
    logits_TK = torch.where(low_T1, logits_TE.gather(1, ids_TK), 0.0)
    plain_TK = chosen_TK / torch.where(low_T1, 1.0, sum_T1)
    return torch.where(low_T1, logits_TK.softmax(dim=-1), plain_TK) * options.scale


@torch.no_grad()
def _count(ids_TK: Tensor, mask_T: Tensor | None, sequences: int, experts: int) -> tuple[Tensor, Tensor]:
    """Return the choices per sequence and expert [B, E] and the valid tokens per sequence [B]; int64."""
    tokens, k = ids_TK.shape
    if mask_T is None:
        mask_T = torch.ones(tokens, dtype=torch.bool, device=ids_TK.device)
    valid_BN = mask_T.reshape(sequences, tokens // sequences).long()
    ones_BX = valid_BN.repeat_interleave(k, dim=1)
    ids_BX = ids_TK.reshape(sequences, tokens // sequences * k)
    counts_BE = ids_TK.new_zeros(sequences, experts).scatter_add_(1, ids_BX, ones_BX)
    return counts_BE, valid_BN.sum(dim=1)
