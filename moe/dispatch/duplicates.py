"""Tokens that all ranks of an axis hold: each routes and dispatches its share of them.  S positions, D hidden."""

from __future__ import annotations

import torch
from torch import Tensor

from ..collectives import LOCAL, Axis, gather_tokens, split_tokens


class DropDuplicates:
    """At a layer's entry each rank keeps its share of every sequence; at its exit it gets the whole output back.

    For tensor parallelism without sequence parallelism, where activations are the same on all ranks of ``axis``:
    otherwise each token is dispatched, and trained on, once per rank (DeepSpeed-TED, arXiv 2303.06318). The gradient
    of ``x`` is whole on every rank; those of the router and the shared experts are this rank's share, to be summed over
    the axis. Shares differ by one position at most and may be empty.
    """

    def __init__(self, axis: Axis = LOCAL) -> None:
        self.axis = axis

    def split(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """This rank's positions of ``x`` [..., S, D] and ``mask`` [..., S]."""
        if self.axis.size == 1:
            return x, mask
        if x.dim() < 2:
            raise ValueError(f"x.shape={tuple(x.shape)}: must be [..., S, D] where duplicate tokens are dropped")
        share = split_tokens(x.movedim(-2, 0), self.axis).movedim(0, -2)
        return share, None if mask is None else split_tokens(mask.movedim(-1, 0), self.axis).movedim(0, -1)

    def join(self, y: Tensor, whole: torch.Size) -> Tensor:
        """All positions of the ``whole`` shape [..., S, D] from the ranks' shares [..., s, D]."""
        if self.axis.size == 1:
            return y
        return gather_tokens(y.movedim(-2, 0), whole[-2], self.axis).movedim(0, -2)
