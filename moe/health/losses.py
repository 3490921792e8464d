"""Recognises spikes of the training loss."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import fmean, pstdev

#: losses that are remembered, and the number that must be known before one can be called a spike
WINDOW, ENOUGH = 128, 32


class LossWindow:
    """Remembers the losses of the last steps that updated the weights.

    A loss that is not finite, or a spike, must not be added: it would hide the next one (in a window with one NaN, no
    later loss is ever a spike).
    """

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self.losses = list(losses)[-WINDOW:]

    def is_spike(self, loss: float, sigmas: float) -> bool:
        """Return whether ``loss`` is more than ``sigmas`` standard deviations above the mean of the window.

        Deviations smaller than one thousandth of the mean count as that: a loss that hardly moves has no spikes.
        """
        if len(self.losses) < ENOUGH:
            return False
        mean = fmean(self.losses)
        return loss - mean > sigmas * max(pstdev(self.losses, mean), 1e-3 * abs(mean))

    def add(self, loss: float) -> None:
        """Remember the loss of a step that updated the weights."""
        if math.isfinite(loss):
            self.losses = [*self.losses[1 - WINDOW :], loss]
