"""The load balancing of an engine's step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor

from ..balance import Step


class StepBalance:
    """Drives the steps of this rank's parts of a model, each with the MoE layers of one part, together."""

    def __init__(self, steps: Sequence[Step], exact: bool) -> None:
        #: ``exact``: some layer of the whole model, on whichever rank, has an exact estimator
        self._steps, self._exact = steps, exact
        self._micro_batches = 1

    @property
    def counts_ahead(self) -> bool:
        """Every micro-batch of this step is to be run ahead, without gradient, so that the first backward knows all
        counts. (Those of a single one are known anyway.)"""
        return self._exact and self._micro_batches > 1

    def begin(self, micro_batches: int, tokens: Tensor) -> None:
        """Start a step; ``tokens``, an int64 scalar, are all that its ``micro_batches`` route on all ranks."""
        self._micro_batches = micro_batches
        for step in self._steps:
            step.begin(micro_batches, tokens)

    @contextmanager
    def micro_batch(self, number: int, ahead: bool = False) -> Iterator[None]:
        """Around forward and backward of a micro-batch, or around a forward that counts ``ahead`` of those."""
        with ExitStack() as stack:
            for step in self._steps:
                stack.enter_context(step.micro_batch(number, ahead))
            yield

    def discard(self) -> None:
        """Forget the step under way."""
        for step in self._steps:
            step.discard()

    def end(self, applied: bool) -> None:
        """Close the step; with ``applied`` the optimizer has moved the weights."""
        for step in self._steps:
            step.end(applied)
