"""The contact between an engine's step and load balancing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from ..balance import counting_pass


class StepBalance:
    """Tells the MoE layers what the engine does.

    The layers find the end of a step by themselves, so :meth:`end` and :meth:`discard` have nothing to tell.
    """

    def __init__(self, exact: bool) -> None:
        #: some layer of the whole model, on whichever rank, has an exact estimator
        self._exact = exact
        self._micro_batches = 1

    @property
    def counts_ahead(self) -> bool:
        """Every micro-batch of this step is to be run ahead, without gradient, so that the first backward knows all
        counts. (Those of a single one are known anyway.)"""
        return self._exact and self._micro_batches > 1

    def begin(self, micro_batches: int, tokens: Tensor) -> None:
        """A step of that many micro-batches begins; ``tokens``, an integer scalar, are valid in it on all ranks."""
        self._micro_batches = micro_batches

    def micro_batch(self, m: int, ahead: bool = False) -> AbstractContextManager[None]:
        """Around forward and backward of micro-batch ``m``, or around a forward that counts ``ahead`` of those."""
        return counting_pass() if ahead else nullcontext()

    def end(self, applied: bool) -> None:
        """The step is over; with ``applied`` the optimizer has moved the weights."""

    def discard(self) -> None:
        """Forget what is left of a step that was broken off."""
