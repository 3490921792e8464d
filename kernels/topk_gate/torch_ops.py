"""The gate in plain torch functions. All results share one backward, because its steps are small.

With u the logarithms of the scores, all probabilities are softmax(u), and the weights are softmax(u) over the choice.
"""

# T tokens, E experts, K top-k, B sequences, G groups.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import readable
from .types import LOW, GateOptions, GateOutput, least_sum, lowest_bias

#: up to this many choices, repeated argmax is faster than sorting on a CPU; on accelerators each launch costs time
_ONE_BY_ONE = 16


def topk_gate(
    logits_TE: Tensor, bias_E: Tensor | None, mask_T: Tensor | None, ids_TK: Tensor | None, options: GateOptions
) -> GateOutput:
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    with torch.no_grad():
        scores_TE, scale_T1 = _score(logits_TE, options)
        if ids_TK is None:
            ids_TK = choose(scores_TE, scale_T1, bias_E, options)
        counts_BE, tokens_B = _count(ids_TK, mask_T, options.sequences, logits_TE.shape[1])
    weights_TK, prob_sums_BE, z_sum = _Weigh.apply(logits_TE, scores_TE, scale_T1, ids_TK, mask_T, options)
    return GateOutput(ids_TK, weights_TK, counts_BE, tokens_B, prob_sums_BE, z_sum)


class _Weigh(torch.autograd.Function):
    """Returns the weights of a choice, and the sums of probabilities and z. ``scores_TE`` belong to the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        scores_TE: Tensor,
        scale_T1: Tensor | None,
        ids_TK: Tensor,
        mask_T: Tensor | None,
        options: GateOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        softmax = options.score == "softmax"
        # as the largest score is exp(largest logit - logsumexp), a softmax needs no second pass of exponentials
        log_sum_T = logits_TE.amax(dim=-1) - scores_TE.amax(dim=-1).log() if softmax else logits_TE.logsumexp(dim=-1)
        shares_TK = _shares(logits_TE, log_sum_T, scores_TE, scale_T1, ids_TK, options)
        probs_TE = scores_TE if softmax else scores_TE / scores_TE.sum(dim=-1, keepdim=True)
        # the same tensors whether the choice was given or made here: recomputation relies on it
        of_sigmoid = (None, None) if softmax else (logits_TE, scores_TE)
        ctx.save_for_backward(ids_TK, mask_T, shares_TK, probs_TE, log_sum_T, *of_sigmoid)
        if not torch.compiler.is_compiling():  # dynamo cannot trace it
            ctx.set_materialize_grads(False)
        ctx.options, z_T = options, log_sum_T.square()
        if mask_T is not None:
            probs_TE, z_T = torch.where(mask_T[:, None], probs_TE, 0.0), torch.where(mask_T, z_T, 0.0)
        weights_TK = shares_TK if options.scale == 1 else shares_TK * options.scale
        return weights_TK, _sums_of_sequences(probs_TE, options.sequences), z_T.sum()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dweights_TK: Tensor | None, dsums_BE: Tensor | None, dz: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ids_TK, mask_T, shares_TK, probs_TE, log_sum_T, logits_TE, scores_TE = ctx.saved_tensors
        options: GateOptions = ctx.options
        if dsums_BE is None:
            grad_TE = torch.zeros_like(probs_TE)
        else:
            tokens = probs_TE.shape[0] // options.sequences
            dprobs_TE = dsums_BE.expand(tokens, -1) if options.sequences == 1 else dsums_BE.repeat_interleave(tokens, 0)
            if mask_T is not None:
                dprobs_TE = dprobs_TE.masked_fill(~mask_T[:, None], 0)
            grad_TE = _softmax_gradient(dprobs_TE, probs_TE)
        dchosen_TK = None
        if dweights_TK is not None:
            dshares_TK = dweights_TK if options.scale == 1 else dweights_TK * options.scale
            relative = options.normalize or options.softmax_after_topk
            dchosen_TK = _softmax_gradient(dshares_TK, shares_TK) if relative else dshares_TK * shares_TK
        if dchosen_TK is not None and not options.softmax_after_topk:
            grad_TE.scatter_add_(1, ids_TK, dchosen_TK)
        if scores_TE is not None:
            grad_TE.mul_(1 - scores_TE)
        elif not options.normalize:  # else the gradient of u sums to 0
            grad_TE.sub_(probs_TE * grad_TE.sum(dim=-1, keepdim=True))
        if dchosen_TK is not None and options.softmax_after_topk:
            grad_TE.scatter_add_(1, ids_TK, dchosen_TK)
        if dz is not None:
            of_logits_TE = probs_TE if logits_TE is None else (logits_TE - log_sum_T[:, None]).exp()
            dlog_sum_T = 2 * dz * (log_sum_T if mask_T is None else torch.where(mask_T, log_sum_T, 0.0))
            grad_TE.addcmul_(of_logits_TE, dlog_sum_T[:, None])
        return grad_TE, *(None,) * 5


def _softmax_gradient(dy: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of the logits of the softmax ``y`` over the last dimension."""
    return torch._softmax_backward_data(dy, y, -1, y.dtype)


def _sums_of_sequences(values_TX: Tensor, sequences: int) -> Tensor:
    """[B, X], the sums over each sequence's tokens."""
    if sequences == 1:
        return values_TX.sum(0, keepdim=True)
    tokens, width = values_TX.shape
    return values_TX.reshape(sequences, tokens // sequences, width).sum(1)


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
    best: list[Tensor] = []
    for _ in range(k):
        if best:
            values_TE = values_TE.scatter(1, best[-1], float("-inf"))
        best.append(values_TE.argmax(dim=-1, keepdim=True))  # the lowest column of equal values
    return torch.cat(best, dim=1)


def _shares(
    logits_TE: Tensor,
    log_sum_T: Tensor,
    scores_TE: Tensor,
    scale_T1: Tensor | None,
    ids_TK: Tensor,
    options: GateOptions,
) -> Tensor:
    """Return the chosen experts' weights before they are scaled, [T, K]."""
    if options.softmax_after_topk:
        return logits_TE.gather(1, ids_TK).softmax(dim=-1)
    if options.normalize and options.score == "softmax":  # the same, but NaN if any logit is
        return (logits_TE.gather(1, ids_TK) - log_sum_T[:, None]).softmax(dim=-1)
    chosen_TK = scores_TE.gather(1, ids_TK)
    if not options.normalize:
        return chosen_TK if scale_T1 is None else chosen_TK * scale_T1
    sum_T1 = chosen_TK.sum(dim=-1, keepdim=True)
    low_T1 = sum_T1 < least_sum()
    if readable(low_T1) and not low_T1.any():
        return chosen_TK / sum_T1
    return torch.where(low_T1, logits_TE.gather(1, ids_TK).softmax(dim=-1), chosen_TK / sum_T1)


def _count(ids_TK: Tensor, mask_T: Tensor | None, sequences: int, experts: int) -> tuple[Tensor, Tensor]:
    """Return the choices per sequence and expert [B, E] and the valid tokens per sequence [B]; int64."""
    tokens, k = ids_TK.shape
    if mask_T is None and sequences == 1 and readable(ids_TK):  # one call; on accelerators it would make the host wait
        return ids_TK.reshape(-1).bincount(minlength=experts)[None], ids_TK.new_full((1,), tokens)
    ids_BX = ids_TK.reshape(sequences, ids_TK.numel() // sequences)
    if mask_T is None:
        ones_BX, tokens_B = torch.ones_like(ids_BX), ids_TK.new_full((sequences,), tokens // sequences)
    else:
        valid_BX = mask_T.reshape(sequences, tokens // sequences).long()
        ones_BX, tokens_B = valid_BX.repeat_interleave(k, dim=1), valid_BX.sum(dim=1)
    return ids_TK.new_zeros(sequences, experts).scatter_add_(1, ids_BX, ones_BX), tokens_B
