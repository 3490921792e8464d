"""The result of sorting routed rows by expert."""

# S source rows, K choices per row, R = S*K routed rows, E experts.

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


def check_range(low: int, high: int, num_experts: int) -> None:
    """Raise ValueError unless the lowest and the highest id are those of experts, or -1."""
    if low < -1 or high >= num_experts:
        raise ValueError(f"ids_SK in [{low}, {high}]: use 0..{num_experts - 1}, or -1 for a dropped choice")


class ExpertOrder(NamedTuple):
    """The order of routed rows that are sorted by expert. All three tensors are int64."""

    #: [R] the flat index ``s*K + k`` of each sorted row; dropped rows come last
    order_R: Tensor
    #: [S, K] the position in sorted order of choice k of source row s; -1 if the choice is dropped
    inverse_SK: Tensor
    #: [E+1] the sorted rows of expert e are ``offsets[e]:offsets[e+1]``; ``offsets[E]`` rows are kept (not dropped)
    offsets_E: Tensor
