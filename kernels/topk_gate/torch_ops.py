"""The gate as a composition of torch functions, differentiated by autograd."""

# T tokens, E experts, K top-k, B sequences, G groups, X choices of a sequence.

from __future__ import annotations

import torch
from torch import Tensor

from .gate import Gate, Method

#: up to so many choices, taking the best of all one by one is faster than sorting all; not where launches cost
_ONE_BY_ONE = 16


def topk_gate(
    logits_TE: Tensor, bias_E: Tensor | None, mask_T: Tensor | None, ids_TK: Tensor | None, method: Method
) -> Gate:
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    scores_TE = logits_TE.softmax(dim=-1) if method.score == "softmax" else logits_TE.sigmoid()
    if ids_TK is None:
        ids_TK = choose(scores_TE, bias_E, method)
    weights_TK = _weigh(logits_TE, scores_TE, ids_TK, method)
    probs_TE, z_T = _normalized(scores_TE), logits_TE.logsumexp(dim=-1).square()
    if mask_T is not None:
        probs_TE, z_T = torch.where(mask_T[:, None], probs_TE, 0.0), torch.where(mask_T, z_T, 0.0)
    counts_BE, tokens_B = _count(ids_TK, mask_T, method.sequences, logits_TE.shape[1])
    return Gate(
        ids_TK=ids_TK,
        weights_TK=weights_TK,
        counts_BE=counts_BE,
        tokens_B=tokens_B,
        prob_sums_BE=probs_TE.reshape(method.sequences, -1, logits_TE.shape[1]).sum(dim=1),
        z_sum=z_T.sum(),
    )


@torch.no_grad()
def choose(scores_TE: Tensor, bias_E: Tensor | None, method: Method) -> Tensor:
    """int64 [T, K] the chosen experts, best first."""
    wanted_TE = scores_TE if bias_E is None else scores_TE + bias_E.to(scores_TE.dtype)
    if method.kept_groups < method.groups:
        size = scores_TE.shape[1] // method.groups
        worth_TG = wanted_TE.unflatten(1, (method.groups, size)).topk(min(2, size), dim=-1).values.sum(dim=-1)
        kept_TG = torch.zeros_like(worth_TG, dtype=torch.bool)
        kept_TG.scatter_(1, _best(worth_TG, method.kept_groups), True)
        wanted_TE = torch.where(kept_TG.repeat_interleave(size, dim=1), wanted_TE, float("-inf"))
    return _best(wanted_TE, method.k)


def _best(values_TE: Tensor, k: int) -> Tensor:
    """int64 [T, K] the columns of the k highest, best first, of equal ones the lower; torch.topk leaves that open."""
    if not values_TE.is_cpu or k > _ONE_BY_ONE:
        return values_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
    left_TE, best = values_TE.clone(), []
    for _ in range(k):
        best.append(left_TE.argmax(dim=-1, keepdim=True))  # the first of equal ones
        left_TE.scatter_(1, best[-1], float("-inf"))
    return torch.cat(best, dim=1)


def _normalized(scores: Tensor) -> Tensor:
    return scores / scores.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def _weigh(logits_TE: Tensor, scores_TE: Tensor, ids_TK: Tensor, method: Method) -> Tensor:
    if method.softmax_after_topk:
        return logits_TE.gather(1, ids_TK).softmax(dim=-1) * method.scale
    chosen_TK = scores_TE.gather(1, ids_TK)
    return (_normalized(chosen_TK) if method.normalize else chosen_TK) * method.scale


@torch.no_grad()
def _count(ids_TK: Tensor, mask_T: Tensor | None, sequences: int, experts: int) -> tuple[Tensor, Tensor]:
    tokens, k = ids_TK.shape
    if mask_T is None:
        mask_T = torch.ones(tokens, dtype=torch.bool, device=ids_TK.device)
    valid_BN = mask_T.reshape(sequences, tokens // sequences).long()
    ones_BX = valid_BN.repeat_interleave(k, dim=1)
    ids_BX = ids_TK.reshape(sequences, tokens // sequences * k)
    counts_BE = ids_TK.new_zeros(sequences, experts).scatter_add_(1, ids_BX, ones_BX)
    return counts_BE, valid_BN.sum(dim=1)
