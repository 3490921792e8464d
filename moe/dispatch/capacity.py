"""Which choices an expert with limited capacity keeps.

T tokens, K top-k, E experts, B sequences, R choices (of this rank, or of all ranks that share a limit).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..collectives import LOCAL, Axis, exchange_sizes, gather_rows
from ..config import CapacityConfig, MoEConfig
from ..placement import Owners, Placement
from ..types import Routing


def by_probability(weights_R: Tensor) -> Tensor:
    """The highest weights first; of equal ones the earlier token."""
    return torch.sort(weights_R, descending=True, stable=True).indices


def by_position(weights_R: Tensor) -> Tensor:
    """The earliest tokens first."""
    return torch.arange(weights_R.numel(), device=weights_R.device)


#: the order, int64 [R], in which choices ask for a place, given their weights by position of the token
DROP_POLICIES: dict[str, Callable[[Tensor], Tensor]] = {"probability": by_probability, "position": by_position}


class Capacity:
    """At most ceil(factor * K * T / bins) choices per bin: an expert, or the experts of one device.

    T counts the valid tokens over ``axis``, whose ranks share the limit: each knows all choices and keeps its own of
    those that stay. Tokens are ordered by rank, or, with ``by_sequence``, for ranks that hold parts of the same
    sequences, by sequence and then by ``positions_S``, int64, the positions in the sequence that this rank holds (None:
    by rank). Counts of the balance loss do not see the drop.
    """

    def __init__(
        self,
        config: CapacityConfig,
        owners: Owners,
        axis: Axis = LOCAL,
        by_sequence: bool = False,
        positions_S: Tensor | None = None,
    ) -> None:
        self.factor, self.axis, self.by_sequence, self.positions_S = config.factor, axis, by_sequence, positions_S
        self.order, self.pads = DROP_POLICIES[config.drop], config.pad
        by_device = config.level == "device"
        self.bins = owners.ranks if by_device else owners.num_experts
        self.bin_of: Callable[[Tensor], Tensor] = owners.rank_of if by_device else _itself

    @contextmanager
    def of_sequences(self, axis: Axis) -> Iterator[None]:
        """Within it, the limit is one of whole sequences, which the ranks of ``axis`` hold parts of."""
        before = self.axis, self.by_sequence
        self.axis, self.by_sequence = axis, True
        try:
            yield
        finally:
            self.axis, self.by_sequence = before

    @torch.no_grad()
    def __call__(self, routing: Routing) -> Routing:
        ids_TK, sequences = routing.ids_TK, routing.counts_BE.shape[0]
        tokens = gather_rows(routing.tokens_B.sum().reshape(1), [1] * self.axis.size, self.axis).sum()
        # fp64, and in the same order as `rows_per_expert`: a padded exchange has a place for all that stay
        limit = torch.ceil(tokens.double() * (self.factor * ids_TK.shape[1]) / self.bins)
        bin_TK = self.bin_of(ids_TK)
        sizes = exchange_sizes(ids_TK, self.axis)
        bin_R = gather_rows(bin_TK, sizes, self.axis).flatten()
        weight_R = gather_rows(routing.weights_TK.detach(), sizes, self.axis).flatten()
        position_R = self._by_position(sizes, sequences, ids_TK)
        asking_R = position_R[self.order(weight_R[position_R])]
        kept_R = _first(bin_R, asking_R, limit)
        start = sum(sizes[: self.axis.rank])
        return routing.keep(kept_R.view(-1, ids_TK.shape[1])[start : start + ids_TK.shape[0]])

    def _by_position(self, sizes: list[int], sequences: int, ids_TK: Tensor) -> Tensor:
        """int64 [R], the choices of all ranks in the order of their tokens."""
        (tokens, top_k), device = ids_TK.shape, ids_TK.device
        if not self.by_sequence:
            return torch.arange(sum(sizes) * top_k, device=device)
        each = max(tokens // sequences, 1)
        token_T = torch.arange(tokens, device=device)
        place_T = torch.full_like(token_T, self.axis.rank)
        if self.positions_S is not None:
            if self.positions_S.device != device:  # they follow the layer, in its first forward on another device
                self.positions_S = self.positions_S.to(device)
            place_T = self.positions_S[token_T % each]
        key_R = gather_rows((token_T // each << 32) + place_T, sizes, self.axis).repeat_interleave(top_k)
        return torch.sort(key_R, stable=True).indices


def _itself(ids: Tensor) -> Tensor:
    return ids


def _first(bin_R: Tensor, asking_R: Tensor, limit: Tensor) -> Tensor:
    """bool [R]: which choices are among the first ``limit`` of their bin to ask."""
    asked_R = bin_R[asking_R]
    by_bin_R = torch.sort(asked_R, stable=True).indices
    sorted_R = asked_R[by_bin_R]
    # place in the queue of its bin: distance to the bin's first row
    place_R = torch.arange(bin_R.numel(), device=bin_R.device) - torch.searchsorted(sorted_R, sorted_R)
    kept_R = torch.empty_like(bin_R, dtype=torch.bool)
    kept_R[asking_R[by_bin_R]] = place_R < limit
    return kept_R


def build_capacity(config: MoEConfig, placement: Placement) -> Capacity | None:
    """The limit that ``config.capacity`` asks for, on the ranks of ``placement``; None: dropless."""
    capacity = config.capacity
    if capacity is None:
        return None
    axis = {"local": LOCAL, "sequence": placement.sequence, "global": placement.tokens}[capacity.scope]
    owners, by_sequence = placement.owners_of(config.num_experts), capacity.scope == "sequence"
    return Capacity(capacity, owners, axis, by_sequence, placement.positions_S)
