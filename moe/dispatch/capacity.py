"""Which choices an expert with limited capacity keeps. T tokens, K top-k, E experts, R = T*K choices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..config import CapacityConfig
from ..types import Routing


def by_probability(routing: Routing) -> Tensor:
    """The highest weights first; of equal ones the earlier token."""
    return torch.sort(routing.weights_TK.detach().flatten(), descending=True, stable=True).indices


def by_position(routing: Routing) -> Tensor:
    """The earliest tokens first."""
    return torch.arange(routing.ids_TK.numel(), device=routing.ids_TK.device)


#: the order, int64 [R], in which choices ask for a place
DROP_POLICIES: dict[str, Callable[[Routing], Tensor]] = {"probability": by_probability, "position": by_position}


class Dropless:
    """Every choice is computed."""

    def __call__(self, routing: Routing) -> Routing:
        return routing


class Capacity:
    """At most ceil(factor * K * T / E) choices per expert, T the valid tokens of this rank's micro-batch."""

    def __init__(self, config: CapacityConfig) -> None:
        self.factor = config.factor
        self.order = DROP_POLICIES[config.drop]

    @torch.no_grad()
    def __call__(self, routing: Routing) -> Routing:
        ids_TK, num_experts = routing.ids_TK, routing.counts_BE.shape[1]
        limit = torch.ceil(routing.tokens_B.sum() * ids_TK.shape[1] * (self.factor / num_experts))
        asking_R = self.order(routing)
        ids_R = ids_TK.flatten()[asking_R]
        by_expert_R = torch.sort(ids_R, stable=True).indices
        sorted_R = ids_R[by_expert_R]
        # place in the queue of its expert: distance to the expert's first row
        place_R = torch.arange(ids_R.numel(), device=ids_R.device) - torch.searchsorted(sorted_R, sorted_R)
        kept_R = torch.empty_like(ids_R, dtype=torch.bool)
        kept_R[asking_R[by_expert_R]] = place_R < limit
        return routing.keep(kept_R.view_as(ids_TK))
