"""Balanced assignment: experts share the tokens of a micro-batch equally, on each rank by itself.

T tokens, E experts, K top-k. Masked tokens take no share.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .select import top_k

#: updates of :func:`sinkhorn`, so many that the loads rarely change any more; a test for it would wait for the device
SINKHORN_STEPS = 100


def sinkhorn(logits_TE: Tensor, wanted_TE: Tensor, mask_T: Tensor | None, sequences: int, k: int) -> Tensor:
    """Choose the k best experts of Sinkhorn's balanced matrix (S-BASE, arXiv 2202.01169).

    Its rows sum to 1, and its columns to T/E. It is exp(logits) times a factor per token and one per expert, so the
    choice depends on the latter only.
    """
    if len(logits_TE) == 0:
        return top_k(logits_TE, k)
    logits_TE = logits_TE.double()
    exp_TE = logits_TE - logits_TE.amax(1, keepdim=True)
    if mask_T is not None:
        exp_TE = exp_TE.masked_fill(~mask_T[:, None], -torch.inf)
    # an expert with much lower logits than others would have a column of zeros
    highest_E = exp_TE.amax(0).nan_to_num(neginf=0.0)
    exp_TE = (exp_TE - highest_E).exp()
    tokens = len(exp_TE) if mask_T is None else mask_T.sum()
    smallest = torch.finfo(exp_TE.dtype).tiny
    factor_E = exp_TE.new_ones(exp_TE.shape[1])
    for _ in range(SINKHORN_STEPS):
        factor_T = 1 / (exp_TE @ factor_E).clamp_min(smallest)
        factor_E = tokens / len(factor_E) / (factor_T @ exp_TE).clamp_min(smallest)
    return top_k(logits_TE - highest_E + factor_E.log(), k)


def balanced(logits_TE: Tensor, wanted_TE: Tensor, mask_T: Tensor | None, sequences: int) -> Tensor:
    """Give each expert at most ceil(T/E) tokens, and maximise the sum of their logits (BASE, arXiv 2103.16716).

    Computed on the host, which waits for the logits once per layer.
    """
    scores_TE = logits_TE.detach().double()
    if mask_T is not None:
        scores_TE = scores_TE.masked_fill(~mask_T[:, None], float("nan"))
    return torch.where(scores_TE.isfinite().all(1), assign(scores_TE), top_k(logits_TE, 1)[:, 0])[:, None]


@torch.library.custom_op("equimoe_routing::assign", mutates_args=())
def assign(scores_TE: Tensor) -> Tensor:
    """Return :func:`auction`'s expert for each token, int64 [T], on the device of the scores, and 0 for tokens whose
    scores are not finite. It is an op, because a graph cannot hold a loop that depends on values."""
    on_host_TE = scores_TE.cpu()
    expert_T = on_host_TE.new_zeros(len(on_host_TE), dtype=torch.int64)
    valid_T = on_host_TE.isfinite().all(1)  # the others would bid without end
    expert_T[valid_T] = auction(on_host_TE[valid_T])
    return expert_T.to(scores_TE.device)


@assign.register_fake
def _(scores_TE: Tensor) -> Tensor:
    return scores_TE.new_empty(len(scores_TE), dtype=torch.int64)


def auction(scores_TE: Tensor) -> Tensor:
    """Return an expert for each token, int64 [T]; the sum of their scores is the largest to 1/1000 of their range.

    Tokens bid for experts (Bertsekas' auction). An expert has ceil(T/E) places, and its price is the lowest bid that
    holds one of them. Bids rise by at least ``step``, which costs at most T * step in the end.
    """
    tokens, experts = scores_TE.shape
    if tokens == 0 or experts == 1:
        return torch.zeros(tokens, dtype=torch.int64)
    places = -(-tokens // experts)
    scores_TE = F.pad(scores_TE, (0, 0, 0, places * experts - tokens))  # indifferent bidders fill the last places
    span = float(scores_TE.max() - scores_TE.min())
    step, last = span / 4, span / (1000 * len(scores_TE))
    prices_E, expert_T = torch.zeros(experts, dtype=scores_TE.dtype), scores_TE.argmax(1)
    while span > 0:
        step = max(step, last)  # coarse prices first, because they are found faster
        expert_T, prices_E = _bid(scores_TE, prices_E, places, step)
        if step == last:
            return expert_T[:tokens]
        step /= 5
    return torch.arange(tokens) % experts


def _bid(scores_TE: Tensor, prices_E: Tensor, places: int, step: float) -> tuple[Tensor, Tensor]:
    """Let tokens bid until each holds a place; return their experts and the final prices."""
    (tokens, experts), prices_E = scores_TE.shape, prices_E.clone()
    expert_T, bid_T = torch.full((tokens,), -1), torch.zeros(tokens, dtype=scores_TE.dtype)
    while len(free := (expert_T < 0).nonzero()[:, 0]):
        best = (scores_TE[free] - prices_E).topk(2, dim=1)
        expert_T[free] = wanted = best.indices[:, 0]
        bid_T[free] = prices_E[wanted] + best.values[:, 0] - best.values[:, 1] + step
        asked_E = torch.zeros(experts, dtype=torch.bool).index_fill_(0, wanted, True)
        held = ((expert_T >= 0) & asked_E[expert_T]).nonzero()[:, 0]  # the other experts keep their holders
        held = held[bid_T[held].argsort(descending=True)]
        held = held[expert_T[held].argsort(stable=True)]  # by expert, the highest bid first
        number_E = torch.bincount(expert_T[held], minlength=experts)
        start_E = number_E.cumsum(0) - number_E
        full_E = number_E >= places
        prices_E[full_E] = bid_T[held[start_E[full_E] + places - 1]]
        place = torch.arange(len(held)) - start_E[expert_T[held]]
        expert_T[held[place >= places]] = -1
    return expert_T, prices_E
