"""Splits tokens that all ranks of an axis hold, so that each token is dispatched once.  S positions, D hidden."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..collectives import LOCAL, Axis, gather_tokens, split_tokens


class DropDuplicates:
    """Keeps each rank's part of every sequence at a layer's entry, and gathers the whole output at its exit.

    Tensor parallelism without sequence parallelism needs this: activations are the same on all ranks of ``axis``, so
    each token would be dispatched and trained once per rank (DeepSpeed-TED, arXiv 2303.06318). Every rank gets the
    whole gradient of ``x``. Gradients of the router and the shared experts cover only this rank's part, and must be
    summed over the axis. Parts differ by at most one position and may be empty.
    """

    def __init__(self, axis: Axis = LOCAL) -> None:
        self.axis = axis

    def split(self, x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
        """Take this rank's positions of ``x`` [..., S, D] and of ``others`` [..., S], such as a mask, or None."""
        if self.axis.size == 1:
            return x, *others
        if x.dim() < 2:
            raise ValueError(
                f"x.shape={tuple(x.shape)}: must be [..., S, D] to be split over tp; add a dimension of positions"
            )
        part = split_tokens(x.movedim(-2, 0), self.axis).movedim(0, -2)
        taken = (None if t is None else split_tokens(t.movedim(-1, 0), self.axis).movedim(0, -1) for t in others)
        return part, *taken

    def join(self, y: Tensor, whole: torch.Size) -> Tensor:
        """Gather the ranks' parts [..., s, D] into the ``whole`` shape [..., S, D]."""
        if self.axis.size == 1:
            return y
        return gather_tokens(y.movedim(-2, 0), whole[-2], self.axis).movedim(0, -2)
