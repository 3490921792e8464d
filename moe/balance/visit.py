"""What one layer counted in one micro-batch.  B sequences, E experts, X extras."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..types import Decision
from .losses import Loss, Term
from .sums import Entry


class Visit:
    """One training forward of one layer. What happens again, such as recomputation, finds the same visit.

    A layer that runs several times in a forward pass has a visit each time, and each counts as a micro-batch.
    """

    def __init__(self, number: int, ahead: bool = False) -> None:
        #: unique within the layer and identical on all ranks
        self.number = number
        #: it was counted before its training forward, and still waits for that
        self.was_ahead = self.ahead = ahead
        self.counted = False
        self.decision: Decision
        #: int64 [B, E] and [B], of this rank alone
        self.counts_BE: Tensor
        self.tokens_B: Tensor
        #: fp32 [B, E] and scalar, outside the graph
        self.prob_sums_BE: Tensor
        self.z_sum: Tensor
        #: int64 [1 or B, E + 1], counts and tokens on the ranks that hold parts of the same sequences; by sequence
        #: where a loss is of sequences
        self.own: Entry
        #: int64 [1, E + 1 + X], counts, tokens and extras on all ranks; where nothing asks for those, ``own``
        self.batch: Entry
        #: tokens on this rank; None where a mask hides how many are valid
        self.size: int | None = None
        #: a weak reference that dies with the graph of this forward
        self.graph: Any = lambda: None
        #: the backward in which its forward ran (-1: none), and the one that last read its losses (None: not yet)
        self.opened_in: int = torch._C._current_graph_task_id()
        self.backward_id: int | None = None
        #: a backward that read its losses has come to its end
        self.done = False
        #: its losses have reached the gradients of the weights
        self.paid = False
        #: the main loss, and every loss, as that backward read them
        self.loss: Loss | None = None
        self.terms: list[Term] = []
        #: int64 [E + 1], counts and tokens of its whole step, once that has ended
        self.step_total: Tensor | None = None

    @property
    def read_now(self) -> bool:
        """The backward under way has read its losses."""
        return self.backward_id is not None and self.backward_id == torch._C._current_graph_task_id()

    @property
    def lives(self) -> bool:
        """It waits for its training forward, or its backward has run, runs, or can still run."""
        return self.ahead or self.done or self.read_now or self.graph() is not None

    @cached_property
    def total(self) -> Tensor:
        """int64 [E + 1]: counts and tokens on all ranks that count together."""
        return self._batch_X[: self.counts_BE.shape[1] + 1]

    @property
    def extras(self) -> Tensor:
        """int64 [X]: sums over ranks that were taken together with the counts."""
        return self._batch_X[self.counts_BE.shape[1] + 1 :]

    @cached_property
    def _batch_X(self) -> Tensor:
        return self.batch.get().sum(0)


def reaches(weight: Tensor | None) -> bool | None:
    """Whether the backward under way adds to ``weight.grad``; None where it is a ``torch.autograd.grad`` of the weight.

    True where there is no weight to ask for.
    """
    if weight is None or not weight.requires_grad:
        return True
    try:
        return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(weight).node)
    except RuntimeError:
        return None
