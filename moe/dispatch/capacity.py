"""Drops choices beyond the capacity of an expert.

T tokens, K top-k, E experts, B sequences, R choices (of this rank, or of all ranks that share a limit), which N tokens
make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..collectives import LOCAL, Axis, all_gather_rows, exchange_sizes
from ..config import CapacityConfig, MoEConfig
from ..placement import Owners, Placement
from ..types import Routing


def by_probability(weights_NK: Tensor) -> Tensor:
    """Order choices by descending weight; ties by token, the earlier one first."""
    return torch.sort(weights_NK.flatten(), descending=True, stable=True).indices


def by_position(weights_NK: Tensor) -> Tensor:
    """Keep the order of the tokens."""
    return torch.arange(weights_NK.numel(), device=weights_NK.device)


def by_choice(weights_NK: Tensor) -> Tensor:
    """Let all tokens' first choices go before any second choice (GShard, arXiv 2006.16668); ties by token."""
    return by_position(weights_NK).view(weights_NK.shape).T.flatten()


#: weights of tokens' choices in token order -> int64 [R], the priority order in which choices claim capacity
DROP_POLICIES: dict[str, Callable[[Tensor], Tensor]] = {
    "probability": by_probability,
    "position": by_position,
    "choice": by_choice,
}


class Capacity:
    """Keeps at most ceil(factor * K * T / bins) choices per bin. A bin is an expert, or all experts of a device.

    With ``shares``, expert i keeps at most ceil(factor * K * T * share_i) choices. The shares sum to 1 (MoE++, arXiv
    2410.07348, whose equation 8 lacks the factor K).

    The ranks of ``axis`` share the limit: T is the number of their valid tokens, and each rank gathers all choices to
    decide which of its own to keep. Tokens are ordered by rank. With ``by_sequence``, for ranks that hold parts of the
    same sequences, they are ordered by sequence and then by ``positions_S``, int64, the positions that this rank holds
    (None: by rank). The counts for balance losses are taken before the drop.
    """

    def __init__(
        self,
        config: CapacityConfig,
        owners: Owners,
        axis: Axis = LOCAL,
        by_sequence: bool = False,
        positions_S: Tensor | None = None,
        shares: Sequence[float] | None = None,
    ) -> None:
        self.factor, self.axis, self.by_sequence, self.positions_S = config.factor, axis, by_sequence, positions_S
        self.share_E = None if shares is None else torch.tensor(shares, dtype=torch.float64, device="cpu")
        self.order, self.pads = DROP_POLICIES[config.drop], config.pad
        by_device = config.level == "device"
        self.bins = owners.ranks if by_device else owners.num_experts
        self.bin_of: Callable[[Tensor], Tensor] = owners.rank_of if by_device else _itself

    @contextmanager
    def of_sequences(self, axis: Axis) -> Iterator[None]:
        """Context in which the limit covers whole sequences, of which the ranks of ``axis`` hold parts."""
        before = self.axis, self.by_sequence
        self.axis, self.by_sequence = axis, True
        try:
            yield
        finally:
            self.axis, self.by_sequence = before

    @torch.no_grad()
    def __call__(self, routing: Routing) -> Routing:
        ids_TK, sequences = routing.ids_TK, routing.counts_BE.shape[0]
        tokens = all_gather_rows(routing.tokens_B.sum().reshape(1), [1] * self.axis.size, self.axis).sum()
        # fp64, in the order of operations of `rows_per_expert`, so that a padded exchange has room for all kept rows
        limit = tokens.double() * (self.factor * ids_TK.shape[1]) / self.bins
        bin_TK = self.bin_of(ids_TK)
        sizes = exchange_sizes(ids_TK, self.axis)
        bin_R = all_gather_rows(bin_TK, sizes, self.axis).flatten()
        weight_R = all_gather_rows(routing.weights_TK.detach(), sizes, self.axis).flatten()
        position_R = self._by_position(sizes, sequences, ids_TK)
        asking_R = position_R[self.order(weight_R[position_R].view(-1, ids_TK.shape[1]))]
        kept_R = _first(bin_R, asking_R, torch.ceil(limit * self._relative(bin_R)))
        start = sum(sizes[: self.axis.rank])
        return routing.keep(kept_R.view(-1, ids_TK.shape[1])[start : start + ids_TK.shape[0]])

    def _relative(self, bin_R: Tensor) -> Tensor | float:
        """Return the limits of the choices' bins, relative to equal ones."""
        if self.share_E is None:
            return 1.0
        if self.share_E.device != bin_R.device:  # move once, after the layer moved to another device
            self.share_E = self.share_E.to(bin_R.device)
        return self.share_E[bin_R.clamp_min(0)] * self.bins

    def _by_position(self, sizes: list[int], sequences: int, ids_TK: Tensor) -> Tensor:
        """Return the choices of all ranks in token order, int64 [R]."""
        (tokens, top_k), device = ids_TK.shape, ids_TK.device
        if not self.by_sequence:
            return torch.arange(sum(sizes) * top_k, device=device)
        each = max(tokens // sequences, 1)
        token_T = torch.arange(tokens, device=device)
        place_T = torch.full_like(token_T, self.axis.rank)
        if self.positions_S is not None:
            if self.positions_S.device != device:  # move once, after the layer moved to another device
                self.positions_S = self.positions_S.to(device)
            place_T = self.positions_S[token_T % each]
        key_R = all_gather_rows((token_T // each << 32) + place_T, sizes, self.axis).repeat_interleave(top_k)
        return torch.sort(key_R, stable=True).indices


def _itself(ids: Tensor) -> Tensor:
    return ids


def _first(bin_R: Tensor, asking_R: Tensor, limit: Tensor) -> Tensor:
    """Return bool [R]: whether a choice is among the first of its bin in the order ``asking_R``.

    ``limit`` is their number: one for all, or [R], that of each choice's bin.
    """
    asked_R = bin_R[asking_R]
    by_bin_R = torch.sort(asked_R, stable=True).indices
    sorted_R = asked_R[by_bin_R]
    # place in the queue of its bin = distance to the bin's first row
    place_R = torch.arange(bin_R.numel(), device=bin_R.device) - torch.searchsorted(sorted_R, sorted_R)
    kept_R = torch.empty_like(bin_R, dtype=torch.bool)
    sorted_limit = limit if limit.dim() == 0 else limit[asking_R[by_bin_R]]
    kept_R[asking_R[by_bin_R]] = place_R < sorted_limit
    return kept_R


def build_capacity(config: MoEConfig, placement: Placement) -> Capacity | None:
    """Build the limit that ``config.capacity`` describes, over the ranks of ``placement``; None for dropless."""
    capacity = config.capacity
    if capacity is None:
        return None
    axis = {"local": LOCAL, "sequence": placement.sequence, "global": placement.tokens}[capacity.scope]
    owners, by_sequence = placement.owners_of(config.num_experts), capacity.scope == "sequence"
    return Capacity(capacity, owners, axis, by_sequence, placement.positions_S, config.load_shares)
