"""The oracle: one token at a time, chosen by Python's own sort, differentiated by autograd."""

# T tokens, E experts, K top-k, B sequences.

from __future__ import annotations

import torch
from torch import Tensor

from .gate import Gate, Method


def topk_gate(logits_TE: Tensor, bias_E: Tensor | None, mask_T: Tensor | None, method: Method) -> Gate:
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    (tokens, experts), length = logits_TE.shape, logits_TE.shape[0] // method.sequences
    ids, weights = [], [logits_TE.new_zeros(0, method.k)]
    counts = [[0] * experts for _ in range(method.sequences)]
    valid = [0] * method.sequences
    prob_sums = [logits_TE.new_zeros(experts) for _ in range(method.sequences)]
    z_sum = logits_TE.new_zeros(())
    for t in range(tokens):
        logits_E, b = logits_TE[t], t // length
        scores_E = logits_E.softmax(0) if method.score == "softmax" else 1 / (1 + (-logits_E).exp())
        wanted_E = scores_E.detach() if bias_E is None else scores_E.detach() + bias_E.to(scores_E.dtype)
        chosen = choose(wanted_E.tolist(), method)
        ids.append(chosen)
        weights.append(weigh(logits_E[chosen], scores_E[chosen], method)[None])
        counted = 1 if mask_T is None else int(mask_T[t])
        valid[b] += counted
        for expert in chosen:
            counts[b][expert] += counted
        prob_sums[b] = prob_sums[b] + counted * scores_E / scores_E.sum()
        z_sum = z_sum + counted * logits_E.exp().sum().log() ** 2

    def integers(values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=logits_TE.device)

    ids_TK = integers(ids).view(tokens, method.k)
    return Gate(ids_TK, torch.cat(weights), integers(counts), integers(valid), torch.stack(prob_sums), z_sum)


def choose(wanted: list[float], method: Method) -> list[int]:
    """The k best of the experts in the best groups, best first, equal ones by index."""
    size = len(wanted) // method.groups
    groups = [range(g * size, (g + 1) * size) for g in range(method.groups)]
    worth = [sum(sorted((wanted[e] for e in group), reverse=True)[:2]) for group in groups]
    kept = sorted(range(method.groups), key=lambda g: -worth[g])[: method.kept_groups]
    candidates = sorted(e for g in kept for e in groups[g])
    return sorted(candidates, key=lambda e: -wanted[e])[: method.k]


def weigh(logits_K: Tensor, scores_K: Tensor, method: Method) -> Tensor:
    if method.softmax_after_topk:
        return logits_K.softmax(0) * method.scale
    return (scores_K / scores_K.sum() if method.normalize else scores_K) * method.scale
