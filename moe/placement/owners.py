"""Which rank of the expert axis owns which expert, in which slot.  E experts, P ranks, X anything."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


class Owners:
    """Each expert's rank and slot. A slot is a place among the experts of a rank, from 0 without gaps.

    Rows travel to slots: slot s of rank p has the number ``p * slots + s``, so that a rank's slots are consecutive
    numbers whatever experts it owns. Where experts lie in that order anyway, nothing is looked up.
    """

    def __init__(self, ranks: int, rank_of_E: Sequence[int], slot_of_E: Sequence[int]) -> None:
        """Raises ValueError where a rank owns no expert, or its slots have gaps or are taken twice."""
        self.ranks, self.num_experts = ranks, len(rank_of_E)
        self.rank_of_E, self.slot_of_E = tuple(rank_of_E), tuple(slot_of_E)
        if len(slot_of_E) != self.num_experts:
            raise ValueError(f"slot_of_E: has {len(slot_of_E)} entries; give {self.num_experts}, one for each expert")
        self._experts_of: list[list[int]] = [[] for _ in range(ranks)]
        for expert, rank in enumerate(self.rank_of_E):
            if not 0 <= rank < ranks:
                raise ValueError(f"rank_of_E[{expert}]={rank}: must be at least 0 and less than {ranks} ranks")
            self._experts_of[rank].append(expert)
        for rank, experts in enumerate(self._experts_of):
            experts.sort(key=lambda expert: self.slot_of_E[expert])
            taken = [self.slot_of_E[expert] for expert in experts]
            if taken != list(range(len(taken))):
                raise ValueError(f"slot_of_E: rank {rank} has slots {taken}; number them from 0, each once")
            if not taken:
                raise ValueError(f"rank_of_E: rank {rank} owns no expert; give each of the {ranks} ranks at least one")
        self._tables: dict[torch.device, Tensor] = {}

    @classmethod
    def consecutive(cls, num_experts: int, ranks: int) -> Owners:
        """Equal runs of consecutive experts. Raises ValueError where the ranks do not divide the experts."""
        if num_experts % ranks:
            raise ValueError(f"num_experts={num_experts}: must be divisible by parallel.ep={ranks}")
        each = num_experts // ranks
        return cls(ranks, [e // each for e in range(num_experts)], [e % each for e in range(num_experts)])

    @cached_property
    def slots(self) -> int:
        """Slots of each rank: as many as the rank with most experts fills."""
        return max(map(len, self._experts_of))

    @cached_property
    def in_order(self) -> bool:
        """Every expert's number is that of its slot."""
        return self._slot_of_E == tuple(range(self.num_experts)) and self.slots * self.ranks == self.num_experts

    @property
    def _slot_of_E(self) -> tuple[int, ...]:
        return tuple(r * self.slots + s for r, s in zip(self.rank_of_E, self.slot_of_E, strict=True))

    def experts_of(self, rank: int) -> list[int]:
        """The experts of a rank in the order of their slots."""
        return self._experts_of[rank]

    def to_slots(self, ids: Tensor) -> Tensor:
        """The slot numbers of experts, int64 of any shape; -1 stays -1."""
        if self.in_order:
            return ids
        return torch.where(ids >= 0, self._table(ids.device)[ids.clamp_min(0)], -1)

    def rank_of(self, ids: Tensor) -> Tensor:
        """The ranks of experts, int64 of any shape; -1 stays -1."""
        return torch.div(self.to_slots(ids), self.slots, rounding_mode="floor")

    def by_rank(self, values_XE: Tensor) -> Tensor:
        """[X, P]: sums of per-expert values over each rank's experts."""
        if self.in_order:
            return values_XE.unflatten(-1, (self.ranks, -1)).sum(-1)
        rank_E = self.rank_of(torch.arange(self.num_experts, device=values_XE.device))
        member_EP = rank_E[:, None] == torch.arange(self.ranks, device=values_XE.device)
        return (values_XE[..., None] * member_EP).sum(-2)

    def mean_by_rank(self, values_XE: Tensor) -> Tensor:
        """[X, P]: means of per-expert values over each rank's experts."""
        return self.by_rank(values_XE) / self.by_rank(torch.ones_like(values_XE))

    def to_experts(self, values_P: Tensor) -> Tensor:
        """[E]: each expert's share in per-rank values, which is its rank's value."""
        if self.in_order:
            return values_P.repeat_interleave(self.slots)
        return values_P[self.rank_of(torch.arange(self.num_experts, device=values_P.device))]

    def _table(self, device: torch.device) -> Tensor:
        """int64 [E], the slot number of each expert; one copy for each device, made once."""
        if device not in self._tables:
            self._tables[device] = torch.tensor(self._slot_of_E, dtype=torch.int64, device=device)
        return self._tables[device]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Owners) and (self.ranks, self.rank_of_E, self.slot_of_E) == (
            other.ranks,
            other.rank_of_E,
            other.slot_of_E,
        )

    def __hash__(self) -> int:
        return hash((self.ranks, self.rank_of_E, self.slot_of_E))

    def __repr__(self) -> str:
        return f"Owners(ranks={self.ranks}, experts={self._experts_of})"
