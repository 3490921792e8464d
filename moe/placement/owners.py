"""Maps experts to the ranks that own them, and to slots on these ranks.  E experts, P ranks, X any size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


class Owners:
    """Each expert's rank, and its slot: its index among the experts of that rank, from 0 without gaps.

    Rows are addressed to slots. Slot s of rank p has the number ``p * slots + s``, so that a rank's slots are
    consecutive numbers, whatever experts it owns. If the experts are in this order already, no table is needed.
    """

    def __init__(self, ranks: int, rank_of_E: Sequence[int], slot_of_E: Sequence[int]) -> None:
        """Raises ValueError if a rank's slots have gaps or duplicates. A rank may own no expert."""
        self.ranks, self.num_experts = ranks, len(rank_of_E)
        self.rank_of_E, self.slot_of_E = tuple(rank_of_E), tuple(slot_of_E)
        if len(slot_of_E) != self.num_experts:
            raise ValueError(
                f"slot_of_E: has length {len(slot_of_E)}; give one slot for each expert, {self.num_experts} in all"
            )
        self._experts_of: list[list[int]] = [[] for _ in range(ranks)]
        for expert, rank in enumerate(self.rank_of_E):
            if not 0 <= rank < ranks:
                raise ValueError(f"rank_of_E[{expert}]={rank}: must be at least 0 and less than ranks={ranks}")
            self._experts_of[rank].append(expert)
        for rank, experts in enumerate(self._experts_of):
            experts.sort(key=lambda expert: self.slot_of_E[expert])
            taken = [self.slot_of_E[expert] for expert in experts]
            if taken != list(range(len(taken))):
                raise ValueError(f"slot_of_E: rank {rank} has slots {taken}; number them from 0, each once")
        self._tables: dict[torch.device, Tensor] = {}
        #: number of slots of every rank: that of the rank with the most experts
        self.slots = max(map(len, self._experts_of))
        #: whether every expert's number equals its slot number
        self.in_order = self._slot_of_E == tuple(range(self.num_experts)) and self.slots * ranks == self.num_experts

    @classmethod
    def consecutive(cls, num_experts: int, ranks: int) -> Owners:
        """Assign equal runs of consecutive experts. Raises ValueError if the ranks do not divide the experts."""
        if num_experts % ranks:
            raise ValueError(f"num_experts={num_experts}: must be divisible by parallel.ep={ranks}; change one of them")
        each = num_experts // ranks
        return cls(ranks, [e // each for e in range(num_experts)], [e % each for e in range(num_experts)])

    @classmethod
    def even(cls, widths: Sequence[int], ranks: int) -> Owners:
        """Assign runs of consecutive experts, such that all ranks have equal sums of widths.

        Raises ValueError if an expert would have to be split.
        """
        whole, ends = sum(widths), [0, *accumulate(widths)]
        cuts = [whole * rank // ranks for rank in range(ranks + 1)]
        if whole % ranks or not set(cuts) <= set(ends):
            raise ValueError(
                f"moe.widths={','.join(map(str, widths))}: cannot be cut into parallel.ep={ranks} runs with equal "
                "sums; change their order, the widths, or parallel.ep"
            )
        return cls.of_ranks(ranks, [(end - 1) * ranks // whole for end in ends[1:]])

    @classmethod
    def of_ranks(cls, ranks: int, rank_of_E: Sequence[int]) -> Owners:
        """Assign each expert to the given rank, where it gets the next slot."""
        taken: Counter[int] = Counter()
        slot_of_E = []
        for rank in rank_of_E:
            slot_of_E.append(taken[rank])
            taken[rank] += 1
        return cls(ranks, rank_of_E, slot_of_E)

    @classmethod
    def spread(cls, num_experts: int, ranks: int) -> Owners:
        """Assign runs of consecutive experts of the same length; the last ranks get fewer, or none, as in a DTensor."""
        each = -(-num_experts // ranks)
        return cls.of_ranks(ranks, [e // each for e in range(num_experts)])

    @property
    def _slot_of_E(self) -> tuple[int, ...]:
        return tuple(r * self.slots + s for r, s in zip(self.rank_of_E, self.slot_of_E, strict=True))

    def experts_of(self, rank: int) -> list[int]:
        """Return the experts of a rank in the order of their slots."""
        return self._experts_of[rank]

    def to_slots(self, ids: Tensor) -> Tensor:
        """Map experts, int64 of any shape, to slot numbers; -1 stays -1."""
        if self.in_order:
            return ids
        return torch.where(ids >= 0, self._table(ids.device)[ids.clamp_min(0)], -1)

    def rank_of(self, ids: Tensor) -> Tensor:
        """Map experts, int64 of any shape, to ranks; -1 stays -1."""
        return torch.div(self.to_slots(ids), self.slots, rounding_mode="floor")

    def by_rank(self, values_XE: Tensor) -> Tensor:
        """Sum per-expert values over each rank's experts, [X, P]."""
        if self.in_order:
            return values_XE.unflatten(-1, (self.ranks, -1)).sum(-1)
        rank_E = self.rank_of(torch.arange(self.num_experts, device=values_XE.device))
        member_EP = rank_E[:, None] == torch.arange(self.ranks, device=values_XE.device)
        return (values_XE[..., None] * member_EP).sum(-2)

    def mean_by_rank(self, values_XE: Tensor) -> Tensor:
        """Average per-expert values over each rank's experts, [X, P]."""
        return self.by_rank(values_XE) / self.by_rank(torch.ones_like(values_XE)).clamp_min(1)

    def to_experts(self, values_P: Tensor) -> Tensor:
        """Expand per-rank values to the rank's experts, [E]."""
        if self.in_order:
            return values_P.repeat_interleave(self.slots)
        return values_P[self.rank_of(torch.arange(self.num_experts, device=values_P.device))]

    def _table(self, device: torch.device) -> Tensor:
        """Return the slot number of each expert, int64 [E]; cached per device."""
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
