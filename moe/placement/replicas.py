"""Which ranks hold which expert in a step, and where each choice is sent.

E experts, P ranks, T tokens, K top-k, C ranks that an expert's tokens may go to, R replicas received.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ...kernels.sort_by_expert import sort_by_expert
from .owners import Owners


class Replicas:
    """The owner of every expert, and the ranks that hold a replica of its weights during a step.

    A rank's slots are those of its own experts, then those of its replicas, ordered by owner and by slot there. Nodes
    are ``node_size`` consecutive ranks; None: all ranks are one node. With ``planned``, all its replicas come first,
    and only the others are still to be sent.
    """

    def __init__(
        self,
        owners: Owners,
        ranks_of_E: Sequence[Iterable[int]] | None = None,
        node_size: int | None = None,
        expected_E: Sequence[float] | None = None,
        planned: Replicas | None = None,
    ) -> None:
        """``ranks_of_E`` are the ranks with a replica of each expert; None: no replicas.

        ``expected_E`` is the load that they were chosen for, if any. Raises ValueError for a rank that does not exist,
        holds the expert already, or is named twice.
        """
        self.owners, self.node_size, self.expected_E = owners, node_size or owners.ranks, expected_E
        self.planned = planned
        given = [()] * owners.num_experts if ranks_of_E is None else ranks_of_E
        self.ranks_of_E = tuple(tuple(sorted(ranks)) for ranks in given)
        if len(self.ranks_of_E) != owners.num_experts:
            raise ValueError(f"ranks_of_E: has length {len(self.ranks_of_E)}; give one entry for each expert")
        for expert, ranks in enumerate(self.ranks_of_E):
            owner = owners.rank_of_E[expert]
            if len({owner, *ranks}) <= len(ranks) or any(not 0 <= rank < owners.ranks for rank in ranks):
                raise ValueError(
                    f"ranks_of_E[{expert}]={list(ranks)}: must be different ranks below {owners.ranks}, without the "
                    f"owner {owner}"
                )

    def __len__(self) -> int:
        """Number of replicas on all ranks."""
        return sum(map(len, self.ranks_of_E))

    def holders_of(self, expert: int) -> list[int]:
        """Return the ranks that hold an expert, its owner included, in order."""
        return sorted((self.owners.rank_of_E[expert], *self.ranks_of_E[expert]))

    def experts_of(self, rank: int) -> list[int]:
        """Return the experts that a rank holds, in the order of their slots."""
        return self._held[rank]

    @cached_property
    def slots(self) -> int:
        """Number of slots of every rank: that of the rank with the most experts."""
        return max(map(len, self._held))

    @cached_property
    def _held(self) -> list[list[int]]:
        ranks = range(self.owners.ranks)
        held = [list((self.planned or self.owners).experts_of(rank)) for rank in ranks]
        for owner in ranks:
            for expert in self.owners.experts_of(owner):
                for to in self._new_ranks(expert):
                    held[to].append(expert)
        return held

    def _new_ranks(self, expert: int) -> list[int]:
        """Return the ranks that are still to get a replica of an expert."""
        before = () if self.planned is None else self.planned.ranks_of_E[expert]
        return [rank for rank in self.ranks_of_E[expert] if rank not in before]

    def sent_by(self, rank: int) -> list[list[int]]:
        """Return, for every rank, the slots of this rank's own experts that it gets."""
        sent: list[list[int]] = [[] for _ in range(self.owners.ranks)]
        for slot, expert in enumerate(self.owners.experts_of(rank)):
            for to in self._new_ranks(expert):
                sent[to].append(slot)
        return sent

    def received_by(self, rank: int) -> list[int]:
        """Return the number of replicas that this rank gets from every rank."""
        received = [0] * self.owners.ranks
        for expert in self._held[rank][len((self.planned or self.owners).experts_of(rank)) :]:
            received[self.owners.rank_of_E[expert]] += 1
        return received

    def choices_of(self, rank: int) -> list[list[int]]:
        """Return the ranks that this rank's tokens of each expert are divided over evenly, the first one's first.

        That is this rank if it holds the expert; else the ranks of its node that do; else all that do. Ranks begin at
        different ones, so that what does not divide evenly does not all go to the first holder.
        """
        node, found = rank // self.node_size, []
        for expert in range(self.owners.num_experts):
            holders = self.holders_of(expert)
            near = [r for r in holders if r // self.node_size == node]
            ranks = [rank] if rank in holders else near or holders
            found.append([ranks[(i + rank) % len(ranks)] for i in range(len(ranks))])
        return found

    def rows_sent(self, counts_XE: Tensor, rank: int) -> Tensor:
        """Return how many rows a rank sends to each rank, int64 [X, P], if its tokens make ``counts_XE`` choices."""
        rows_XP = torch.zeros(len(counts_XE), self.owners.ranks, dtype=torch.int64, device=counts_XE.device)
        for expert, ranks in enumerate(self.choices_of(rank)):
            for i, to in enumerate(ranks):
                rows_XP[:, to] += (counts_XE[:, expert].long() + len(ranks) - 1 - i) // len(ranks)
        return rows_XP

    def seen_from(self, rank: int) -> Destinations:
        """Return where the tokens of a rank go."""
        return Destinations(self, rank)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Replicas) and (
            (self.owners, self.ranks_of_E, self.node_size) == (other.owners, other.ranks_of_E, other.node_size)
        )

    def __hash__(self) -> int:
        return hash((self.owners, self.ranks_of_E))

    def __repr__(self) -> str:
        return f"Replicas(experts={self._held})"


class Destinations:
    """Maps the choices of one rank's tokens to slots: slot s of rank p has the number ``p * slots + s``."""

    def __init__(self, replicas: Replicas, rank: int) -> None:
        self.slots, self.experts_of, self.num_experts = replicas.slots, replicas.experts_of, replicas.owners.num_experts
        held = [self.experts_of(r) for r in range(replicas.owners.ranks)]
        slot_of = {(r, expert): slot for r, experts in enumerate(held) for slot, expert in enumerate(experts)}
        choices = replicas.choices_of(rank)
        widest = max(map(len, choices))
        slots = [[r * self.slots + slot_of[r, e] for r in ranks] for e, ranks in enumerate(choices)]
        self._number_E = torch.tensor([len(ranks) for ranks in choices])
        self._slots_EC = torch.tensor([of + [of[0]] * (widest - len(of)) for of in slots])

    def to_slots(self, ids_TK: Tensor) -> Tensor:
        """Map experts, int64 [T, K], to slot numbers; -1 stays -1. An expert's j-th token goes to its j-th choice."""
        if self._slots_EC.device != ids_TK.device:
            self._number_E, self._slots_EC = (t.to(ids_TK.device) for t in (self._number_E, self._slots_EC))
        known_TK = ids_TK.clamp_min(0)
        if self._slots_EC.shape[1] == 1:
            slots_TK = self._slots_EC[:, 0][known_TK]
        else:
            order = sort_by_expert(ids_TK, self.num_experts, backend="torch")
            place_TK = order.inverse_SK - order.offsets_E[known_TK]
            slots_TK = self._slots_EC[known_TK, place_TK.clamp_min(0) % self._number_E[known_TK]]
        return torch.where(ids_TK >= 0, slots_TK, -1)
