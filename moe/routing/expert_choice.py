"""Expert choice: experts choose their tokens (arXiv 2202.09368).

T tokens, E experts, K choices kept per token, G groups of N tokens that compete with each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .select import top_k

#: rounds under a cap; a test whether choices have settled would wait for the device. With 4096 tokens and 64 experts
#: they settle in 20, except that with a cap of k, 1 % of the experts' places may stay empty
ROUNDS = 64


def expert_choice(
    logits_TE: Tensor,
    wanted_TE: Tensor,
    mask_T: Tensor | None,
    sequences: int,
    k: int,
    cap: int | None,
    by_position: bool = False,
) -> Tensor:
    """Let each expert choose the floor(N k / E) tokens with the highest scores; return int64 [T, K], best first.

    All tokens compete; with ``by_position``, only those at one position of the ``sequences``, so that no token depends
    on a later one. A token gets at most ``cap`` experts (None: E), and K is that number; -1 stands for no expert. If N
    tokens are too few for one per expert, each gets its k best experts, as when a text is generated token by token.
    """
    tokens, experts = wanted_TE.shape
    shape = (sequences, tokens // sequences) if by_position else (tokens, 1)
    # [sequences, positions, E] -> [G, N, E]
    wanted_GNE = wanted_TE.view(*shape, experts).transpose(0, 1)
    valid_T = torch.ones_like(wanted_TE[:, 0], dtype=torch.bool) if mask_T is None else mask_T
    valid_GN = valid_T.view(shape).T
    number_G = valid_GN.sum(1) * k // experts
    limit = experts if cap is None else cap
    own_TE = torch.zeros_like(wanted_TE, dtype=torch.bool).scatter_(1, top_k(wanted_TE, k), True)
    chosen_GNE = torch.where(
        number_G[:, None, None] > 0,
        choose_tokens(wanted_GNE, valid_GN, number_G, limit),
        own_TE.view(*shape, experts).transpose(0, 1),
    )
    chosen_TE = chosen_GNE.transpose(0, 1).reshape(tokens, experts) & valid_T[:, None]
    ids_TK = top_k(wanted_TE.masked_fill(~chosen_TE, -torch.inf), limit)
    return ids_TK.masked_fill(~chosen_TE.gather(1, ids_TK), -1)


def choose_tokens(wanted_GNE: Tensor, valid_GN: Tensor, number_G: Tensor, cap: int) -> Tensor:
    """Return bool [G, N, E]: the tokens of each expert, at most ``number_G``, so that no token has more than ``cap``.

    It takes pairs of token and expert in the order of their scores, if both have room; equal scores in the order of
    tokens and experts. So an expert has fewer tokens only if all others have ``cap`` experts with higher scores. This
    is found in rounds: experts ask the best tokens that have not refused them, and tokens refuse all but the best.
    """
    best_token_GNE = wanted_GNE.masked_fill(~valid_GN[..., None], -torch.inf).sort(dim=1, descending=True, stable=True)
    best_expert_GNE = wanted_GNE.sort(dim=2, descending=True, stable=True)
    open_GNE = valid_GN[..., None].expand_as(wanted_GNE)
    for _ in range(ROUNDS if cap < wanted_GNE.shape[2] else 1):
        asked_GNE = _first(open_GNE, best_token_GNE.indices, number_G[:, None, None], 1)
        taken_GNE = _first(asked_GNE, best_expert_GNE.indices, cap, 2)
        open_GNE = open_GNE & (taken_GNE | ~asked_GNE)
    return taken_GNE


def _first(among: Tensor, order: Tensor, number: Tensor | int, dim: int) -> Tensor:
    """Keep the first ``number`` True values along ``dim`` in this order."""
    sorted_ = among.gather(dim, order)
    return torch.empty_like(among).scatter_(dim, order, sorted_ & (sorted_.cumsum(dim) <= number))
