"""The order in which routed rows are computed."""

# S source rows, K choices per row, R = S*K routed rows, E experts.

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ExpertOrder(NamedTuple):
    """Routed rows sorted by expert; all three tensors are int64."""

    #: [R] flat index ``s*K + k`` of each sorted row; dropped rows come last
    order_R: Tensor
    #: [S, K] the sorted row of choice k of source row s; -1 where that choice is dropped
    inverse_SK: Tensor
    #: [E+1] the rows of expert e are ``offsets[e]:offsets[e+1]``; ``offsets[E]`` rows are kept
    offsets_E: Tensor
