"""The reference: token by token, with Python's own sort and weights from logarithms, differentiated by autograd."""

# T tokens, E experts, K top-k, B sequences.

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import LOW, GateOptions, GateOutput, lowest_bias


def topk_gate(
    logits_TE: Tensor, bias_E: Tensor | None, mask_T: Tensor | None, ids_TK: Tensor | None, options: GateOptions
) -> GateOutput:
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    (tokens, experts), length = logits_TE.shape, logits_TE.shape[0] // options.sequences
    ids, weights = [], [logits_TE[:0, : options.k]]
    counts = [[0] * experts for _ in range(options.sequences)]
    valid = [0] * options.sequences
    prob_sums = [logits_TE[:0].sum(0) for _ in range(options.sequences)]  # zero, but part of the graph
    z_sum = logits_TE[:0].sum()
    for t in range(tokens):
        logits_E, b = logits_TE[t], t // length
        log_scores_E = F.logsigmoid(logits_E) if options.score == "sigmoid" else logits_E.log_softmax(0)
        chosen = choose(wanted(logits_E.detach(), bias_E, options), options) if ids_TK is None else ids_TK[t].tolist()
        ids.append(chosen)
        weights.append(weigh(logits_E[chosen], log_scores_E[chosen], options)[None])
        if mask_T is not None and not mask_T[t]:
            continue
        valid[b] += 1
        for expert in chosen:
            counts[b][expert] += 1
        prob_sums[b] = prob_sums[b] + log_scores_E.softmax(0)
        z_sum = z_sum + logits_E.logsumexp(0) ** 2

    def integers(values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=logits_TE.device)

    return GateOutput(
        ids_TK=integers(ids).view(tokens, options.k),
        weights_TK=torch.cat(weights),
        counts_BE=integers(counts),
        tokens_B=integers(valid),
        prob_sums_BE=torch.stack(prob_sums),
        z_sum=z_sum,
    )


def wanted(logits_E: Tensor, bias_E: Tensor | None, options: GateOptions) -> Tensor:
    """Return the values that the selection compares, [E]: scores plus bias.

    Without a bias, sigmoids that would underflow are scaled up by a common factor, which keeps their order.
    """
    lift = logits_E.new_zeros(())
    if options.score == "sigmoid" and -math.inf < float(logits_E.max()) < LOW:
        lift = LOW - logits_E.max()
    scores_E = logits_E.softmax(0) if options.score == "softmax" else (logits_E + lift).sigmoid()
    if bias_E is None:
        return scores_E
    return scores_E * (-lift).exp() + bias_E.to(scores_E.dtype).clamp(min=lowest_bias(scores_E.dtype))


def choose(wanted_E: Tensor, options: GateOptions) -> list[int]:
    """Return the k best experts of the best groups, best first. NaN is best, and equal experts are ordered by index."""

    def best(values: Tensor, candidates: list[int], number: int) -> list[int]:
        order = values.tolist()
        return sorted(candidates, key=lambda i: (0, 0.0) if math.isnan(order[i]) else (1, -order[i]))[:number]

    size = len(wanted_E) // options.groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(options.groups)]
    # sum tensors, not Python numbers: these are wider, and would order groups that are equal in the scores' dtype
    worth = torch.stack([wanted_E[best(wanted_E, group, 2)].sum() for group in members])
    kept = best(worth, list(range(options.groups)), options.kept_groups)
    return best(wanted_E, sorted(e for g in kept for e in members[g]), options.k)


def weigh(logits_K: Tensor, log_scores_K: Tensor, options: GateOptions) -> Tensor:
    if options.softmax_after_topk:
        return logits_K.softmax(0) * options.scale
    return (log_scores_K.softmax(0) if options.normalize else log_scores_K.exp()) * options.scale
