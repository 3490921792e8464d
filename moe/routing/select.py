"""Select functions: choose the experts of each token.  T tokens, E experts, K top-k, G groups of S experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def top_k(wanted_TE: Tensor, k: int) -> Tensor:
    """Choose the k highest scores, best first; ties by the lower expert index."""
    return wanted_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()


def two_best(scores_TGS: Tensor) -> Tensor:
    """Sum of a group's two highest scores (DeepSeek-V3, arXiv 2412.19437)."""
    return scores_TGS.topk(min(2, scores_TGS.shape[-1]), dim=-1).values.sum(-1)


def best(scores_TGS: Tensor) -> Tensor:
    """A group's highest score (DeepSeek-V2, arXiv 2405.04434)."""
    return scores_TGS.amax(-1)


#: name -> function from scores [T, G, S] to the worths [T, G] by which groups are ranked
GROUP_WORTHS: dict[str, Callable[[Tensor], Tensor]] = {"two_best": two_best, "best": best}


def group_limited(
    wanted_TE: Tensor, k: int, groups: int, kept_groups: int, worth: Callable[[Tensor], Tensor] = two_best
) -> Tensor:
    """Choose the k highest scores within the ``kept_groups`` groups of the highest ``worth``.

    The experts are ``groups`` groups of consecutive experts.
    """
    size = wanted_TE.shape[1] // groups
    worth_TG = worth(wanted_TE.unflatten(1, (groups, size)))
    kept_TG = torch.zeros_like(worth_TG, dtype=torch.bool).scatter_(1, top_k(worth_TG, kept_groups), True)
    return top_k(wanted_TE.masked_fill(~kept_TG.repeat_interleave(size, dim=1), float("-inf")), k)


def each_group(
    logits_TE: Tensor, wanted_TE: Tensor, mask_T: Tensor | None, sequences: int, k: int, groups: int
) -> Tensor:
    """Choose the k/groups highest scores of every group (MoGE, arXiv 2505.21411), best first.

    If each rank owns one group, each rank gets equally many rows, whatever the scores.
    """
    (tokens, experts), each = wanted_TE.shape, k // groups
    inside_TGK = top_k(wanted_TE.reshape(tokens * groups, experts // groups), each).view(tokens, groups, each)
    first_G = torch.arange(groups, device=wanted_TE.device) * (experts // groups)
    ids_TK = (inside_TGK + first_G[:, None]).flatten(1)
    return ids_TK.gather(1, top_k(wanted_TE.gather(1, ids_TK), k))


def top_p(logits_TE: Tensor, wanted_TE: Tensor, mask_T: Tensor | None, sequences: int, k: int, p: float) -> Tensor:
    """Choose the fewest best experts, at most k, whose softmax scores sum to at least p (arXiv 2403.07652).

    -1 stands for the choices that a token does not need.
    """
    ids_TK = top_k(wanted_TE, k)
    scores_TK = logits_TE.softmax(-1).gather(1, ids_TK)
    return ids_TK.masked_fill(scores_TK.cumsum(1) - scores_TK >= p, -1)


def in_turn(logits_TE: Tensor, wanted_TE: Tensor, mask_T: Tensor | None, sequences: int, k: int) -> Tensor:
    """Choose all experts in turn, whatever the scores: E tokens in a row give every expert k choices."""
    tokens, experts = wanted_TE.shape
    return torch.arange(tokens * k, device=wanted_TE.device).view(tokens, k) % experts
