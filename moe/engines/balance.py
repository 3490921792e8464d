"""Drives load balancing during an engine's step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor

from ..balance import Step


class StepBalance:
    """Drives the balancing steps of all parts of a model on this rank together. Each part has its own ``Step``.

    ``exact`` says that some layer of the whole model, on whichever rank, uses the exact estimator.
    """

    def __init__(self, steps: Sequence[Step], exact: bool) -> None:
        self._steps, self._exact = steps, exact
        self._micro_batches = 1

    @property
    def counts_ahead(self) -> bool:
        """Whether this step must first run every micro-batch without gradients, so that its first backward knows all
        counts. With one micro-batch that is unnecessary: its own forward counts everything."""
        return self._exact and self._micro_batches > 1

    def begin(self, micro_batches: int, tokens: Tensor) -> None:
        """Start a step. ``tokens``, an int64 scalar, is the number that its micro-batches route on all ranks."""
        self._micro_batches = micro_batches
        for step in self._steps:
            step.begin(micro_batches, tokens)

    @contextmanager
    def micro_batch(self, number: int, ahead: bool = False) -> Iterator[None]:
        """Context for forward and backward of a micro-batch; with ``ahead``, for a forward that only counts."""
        with ExitStack() as stack:
            for step in self._steps:
                stack.enter_context(step.micro_batch(number, ahead))
            yield

    def discard(self) -> None:
        """Discard the current step."""
        for step in self._steps:
            step.discard()

    def end(self, applied: bool) -> None:
        """End the step. If the optimizer did not update the weights, it leaves nothing behind."""
        for step in self._steps:
            step.end() if applied else step.discard()
