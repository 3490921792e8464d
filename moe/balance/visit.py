"""What one layer counted in one micro-batch.  B sequences, E experts, N tokens of all ranks, K top-k, X extras."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..types import Decision, Routing
from .losses import Loss, Term
from .sums import Entry


class Visit:
    """One training forward of one layer. A recomputation of that forward finds the same visit again."""

    def __init__(self, micro_batch: MicroBatch, trains: bool = True) -> None:
        self.micro_batch, self.trains = micro_batch, trains
        self.decision: Decision
        #: fp32 [B, E] and scalar, outside the graph
        self.prob_sums_BE: Tensor
        self.z_sum: Tensor
        #: a weak reference that dies with the graph of this forward
        self.graph: Any = lambda: None
        #: the backward in which its forward ran (-1: none), and the one that last read its losses (None: not yet)
        self.opened_in: int = torch._C._current_graph_task_id()
        self.backward_id: int | None = None
        #: its losses have reached the gradients of the weights
        self.paid = False
        #: the main loss, and every loss, as that backward read them
        self.loss: Loss | None = None
        self.terms: list[Term] = []
        if trains:
            micro_batch.visits.append(self)

    @property
    def done(self) -> bool:
        """A backward has read its losses."""
        return self.backward_id is not None

    @property
    def lives(self) -> bool:
        """Its backward has run, or can still run."""
        return self.done or self.graph() is not None


class MicroBatch:
    """What one layer counted in one micro-batch, all of its visits together."""

    def __init__(self, number: int, ahead: object | None = None) -> None:
        #: unique within the layer and identical on all ranks
        self.number = number
        #: the counting pass that counted it before its training forward
        self.ahead = ahead
        self.visits: list[Visit] = []
        self.counted = False
        #: int64 [B, E] and [B], of this rank alone
        self.counts_BE: Tensor
        self.tokens_B: Tensor
        #: int64 [1 or B, E + 1], counts and tokens on the ranks that hold parts of the same sequences; int64
        #: [1, E + 1 + X], counts, tokens and extras on all ranks. Several where several passes counted it.
        self.own: list[Entry] = []
        self.batch: list[Entry] = []
        #: int64 [N, K], the choices on all ranks, -1 for masked tokens; for a loss that draws from them
        self.choices: list[Tensor] = []
        #: how many votes it has in a bias that goes by votes, and ranks that hold parts of its sequences
        self.voters, self.sequence_ranks = 0, 1
        #: tokens on this rank in each visit; None where a mask hides how many are valid
        self.sizes: set[int | None] = set()
        #: int64 [E + 1], counts and tokens of its whole step, and its choices, once that has ended
        self.step_total: Tensor | None = None
        self.step_choices: list[Tensor] | None = None

    @property
    def waits(self) -> bool:
        """It was counted ahead and has not been trained on."""
        return self.ahead is not None and not self.visits

    @property
    def done(self) -> bool:
        """All its backwards have run."""
        return bool(self.visits) and all(visit.done for visit in self.visits)

    @property
    def lives(self) -> bool:
        """It was counted ahead, or a backward of it has run or can still run."""
        return self.waits or any(visit.lives for visit in self.visits)

    def count(self, routing: Routing, own: Entry, batch: Entry, choices_NK: Tensor | None) -> None:
        """Take in a visit. Visits of one pass share their sums over ranks."""
        first, self.counted = not self.counted, True
        self.counts_BE = routing.counts_BE if first else self.counts_BE + routing.counts_BE
        self.tokens_B = routing.tokens_B if first else self.tokens_B + routing.tokens_B
        self.own += [] if own in self.own else [own]
        self.batch += [] if batch in self.batch else [batch]
        self.choices += [] if choices_NK is None else [choices_NK]

    @property
    def own_BX(self) -> Tensor:
        """int64 [1 or B, E + 1]"""
        return sum_of([entry.get() for entry in self.own])

    @property
    def total(self) -> Tensor:
        """int64 [E + 1]: counts and tokens on all ranks that count together."""
        return self._batch_X[: self.counts_BE.shape[1] + 1]

    @property
    def extras(self) -> Tensor:
        """int64 [X]: sums over ranks that were taken together with the counts."""
        return self._batch_X[self.counts_BE.shape[1] + 1 :]

    @property
    def _batch_X(self) -> Tensor:
        return sum_of([entry.get().sum(0) for entry in self.batch])

    @property
    def prob_sums_E(self) -> Tensor:
        """fp32 [E], of this rank."""
        if not self.visits:
            return torch.zeros(self.counts_BE.shape[1], device=self.counts_BE.device)
        return sum_of([visit.prob_sums_BE.sum(0) for visit in self.visits])


def sum_of(values: list[Tensor]) -> Tensor:
    """The sum of tensors of one shape; of a single one, that tensor."""
    return values[0] if len(values) == 1 else torch.stack(values).sum(0)
