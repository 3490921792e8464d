"""How many tokens are sent to each expert-parallel rank.  T tokens, P ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..placement import Owners
from ..types import Routing


def sent(routing: Routing, mask_T: Tensor | None, owners: Owners) -> Tensor:
    """int64 [P]: valid tokens with a choice, before any drop, on each of the ranks that own the experts."""
    rank_TK = owners.rank_of(routing.decision.chosen_TK)
    sent_TP = torch.zeros(len(rank_TK), owners.ranks, dtype=torch.bool, device=rank_TK.device).scatter_(
        1, rank_TK, True
    )
    return (sent_TP if mask_T is None else sent_TP & mask_T[:, None]).sum(0)
