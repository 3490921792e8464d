"""What one layer counted in one micro-batch.  B sequences, E experts, X extras."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..types import Decision
from .losses import Loss, Term
from .sums import SummedRow

if TYPE_CHECKING:
    from .step import StepTotals


class Visit:
    """One layer's training forward of one micro-batch. Recomputation finds the same visit again.

    A layer that runs several times per forward pass has a visit each time, and each counts as a micro-batch.
    """

    def __init__(self, number: int, ahead: bool = False) -> None:
        #: the micro-batch: unique within the layer and identical on all ranks
        self.number = number
        #: whether a counting pass counted it, and whether its training forward is still to come
        self.was_ahead = self.ahead = ahead
        self.counted = False
        self.decision: Decision
        #: int64 [B, E] and [B], on this rank
        self.counts_BE: Tensor
        self.tokens_B: Tensor
        #: fp32 [B, E] and scalar, on this rank, detached
        self.prob_sums_BE: Tensor
        self.z_sum: Tensor
        self.entropy_sum: Tensor | None = None
        #: int64 [B, E + 1], or [1, E + 1] if no loss needs sequences: counts and tokens on the ranks that hold parts of
        #: the same sequences
        self.own: SummedRow
        #: int64 [1, E + 1 + X]: counts, tokens and extras on all ranks; the same as ``own`` if nothing needs them
        self.batch: SummedRow
        self._batch_X: Tensor | None = None
        #: tokens on this rank; None if a mask hides how many are valid
        self.size: int | None = None
        #: a weak reference that dies with the forward's graph
        self.graph: Any = lambda: None
        #: id of the backward that contained the forward (-1: none), and of the last backward that read the losses
        self.forward_in: int = torch._C._current_graph_task_id()
        self.read_in: int | None = None
        #: whether a backward that read the losses has finished
        self.done = False
        #: whether the losses' gradients have reached the weights
        self.delivered = False
        #: the main loss, and all losses, as the backward read them
        self.loss: Loss | None = None
        self.terms: list[Term] = []
        #: the totals of the step that contained the visit, once it has ended
        self.ended: StepTotals | None = None

    @property
    def being_read(self) -> bool:
        """Whether the current backward has read the losses."""
        return self.read_in == torch._C._current_graph_task_id()  # outside of a backward, -1

    @property
    def lives(self) -> bool:
        """Whether its training forward is still to come, or its backward has run or can still run."""
        return self.ahead or self.done or self.being_read or self.graph() is not None

    @property
    def total(self) -> Tensor:
        """int64 [E + 1]: counts and tokens on all ranks that count together."""
        values_X = self._values()
        return values_X if values_X.shape[0] == self._width else values_X[: self._width]

    @property
    def extras(self) -> Tensor:
        """int64 [X]: per-scope sums that were reduced together with the counts."""
        return self._values()[self._width :]

    @property
    def _width(self) -> int:
        """E + 1."""
        return self.counts_BE.shape[1] + 1

    def _values(self) -> Tensor:
        """int64 [E + 1 + X], computed once."""
        if self._batch_X is None:  # not a cached_property, which takes a lock in some versions of Python
            batch_BX = self.batch.get()
            self._batch_X = batch_BX[0] if batch_BX.shape[0] == 1 else batch_BX.sum(0)
        return self._batch_X


def accumulates(weight: Tensor | None) -> bool | None:
    """Return whether the current backward adds to ``weight.grad``; True for None or a frozen weight.

    Returns None in a ``torch.autograd.grad`` with respect to the weight.
    """
    if weight is None or not weight.requires_grad:
        return True
    try:
        return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(weight).node)
    except RuntimeError:
        return None
