"""Tokens' choices as losses want them that look beyond counts.  T tokens, N tokens of all ranks, E experts, K top-k."""

from __future__ import annotations

import torch
from torch import Tensor

from ..collectives import Axis, exchange_sizes, gather_rows, keeping
from ..placement import Owners
from ..types import Routing


def valid_choices(routing: Routing, mask_T: Tensor | None) -> Tensor:
    """int64 [T, K] before any drop, -1 for masked tokens."""
    chosen_TK = routing.decision.chosen_TK
    return chosen_TK if mask_T is None else chosen_TK.masked_fill(~mask_T[:, None], -1)


def sent(choices_TK: Tensor, owners: Owners) -> Tensor:
    """int64 [P]: tokens with a choice on each of the ranks that own the experts."""
    rank_TK = owners.rank_of(choices_TK.clamp_min(0))
    there_TP = torch.zeros(choices_TK.shape[0], owners.ranks, dtype=torch.bool, device=choices_TK.device)
    return (there_TP.scatter_(1, rank_TK, True) & (choices_TK[:, :1] >= 0)).sum(0)


@torch.no_grad()
def of_all_ranks(choices_TK: Tensor, axis: Axis) -> Tensor:
    """int64 [N, K]: the choices of the axis's ranks in their order. For experiments: bytes grow with the tokens."""
    token = keeping.set(None)  # a recomputation does not come here, so it must find nothing kept
    try:
        return gather_rows(choices_TK, exchange_sizes(choices_TK, axis), axis)
    finally:
        keeping.reset(token)


def draw(choices_NK: Tensor, tokens: Tensor, num_experts: int, seed: int) -> tuple[Tensor, Tensor]:
    """Counts int64 [E] of ``tokens`` tokens drawn without replacement from the valid ones, and how many those were.

    The same on all ranks that hold the same choices: the seed alone decides.
    """
    generator = torch.Generator(choices_NK.device).manual_seed(seed)
    keys_N = torch.rand(choices_NK.shape[0], dtype=torch.float64, device=choices_NK.device, generator=generator)
    valid_N = choices_NK[:, 0] >= 0
    place_N = keys_N.masked_fill(~valid_N, torch.inf).argsort().argsort()
    drawn_N = valid_N & (place_N < tokens)
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=choices_NK.device)
    ones_NK = drawn_N[:, None].expand_as(choices_NK).to(torch.int64)
    return counts_E.scatter_add_(0, choices_NK.clamp_min(0).flatten(), ones_NK.flatten()), drawn_N.sum()
