"""The oracle: one token at a time, chosen by Python's own sort, differentiated by autograd."""

# T tokens, E experts, K top-k, B sequences.

from __future__ import annotations

import torch
from torch import Tensor

from .gate import Gate, Method


def topk_gate(
    logits_TE: Tensor, bias_E: Tensor | None, mask_T: Tensor | None, ids_TK: Tensor | None, method: Method
) -> Gate:
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    (tokens, experts), length = logits_TE.shape, logits_TE.shape[0] // method.sequences
    ids, weights = [], [logits_TE[:0, : method.k]]
    counts = [[0] * experts for _ in range(method.sequences)]
    valid = [0] * method.sequences
    prob_sums = [logits_TE[:0].sum(0) for _ in range(method.sequences)]  # zero, and in the graph
    z_sum = logits_TE[:0].sum()
    for t in range(tokens):
        logits_E, b = logits_TE[t], t // length
        scores_E = logits_E.softmax(0) if method.score == "softmax" else logits_E.sigmoid()
        wanted_E = scores_E.detach() if bias_E is None else scores_E.detach() + bias_E.to(scores_E.dtype)
        chosen = choose(wanted_E.tolist(), method) if ids_TK is None else ids_TK[t].tolist()
        ids.append(chosen)
        weights.append(weigh(logits_E[chosen], scores_E[chosen], method)[None])
        if mask_T is not None and not mask_T[t]:
            continue
        valid[b] += 1
        for expert in chosen:
            counts[b][expert] += 1
        prob_sums[b] = prob_sums[b] + scores_E / scores_E.sum()
        z_sum = z_sum + logits_E.logsumexp(0) ** 2

    def integers(values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=logits_TE.device)

    return Gate(
        ids_TK=integers(ids).view(tokens, method.k),
        weights_TK=torch.cat(weights),
        counts_BE=integers(counts),
        tokens_B=integers(valid),
        prob_sums_BE=torch.stack(prob_sums),
        z_sum=z_sum,
    )


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
