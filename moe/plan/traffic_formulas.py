"""Computes the bytes that a rank sends for one MoE layer in closed form, assuming balanced routing.

T tokens of a rank, D hidden, K top-k, e expert-parallel ranks, g expert-tensor-parallel ranks, S source rows of a rank.
Counting only rows, in the dtype of the computation, the forward of :func:`all_to_all` sends
K T D [2 (e - 1)/e + 2 (g - 1)] values (MoE Parallel Folding, arXiv 2504.14960). The exchange of counts, 8 bytes per
expert, is not included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

_ID = 4

#: alignment of the parts of a row that travel together, and of the row, in bytes
_PART, _ROW = 4, 16


class Bytes(NamedTuple):
    """Bytes sent in a forward and in a backward pass."""

    forward: float
    backward: float

    def __add__(self, other: tuple) -> Bytes:
        return Bytes(*(mine + its for mine, its in zip(self, other, strict=True)))


@dataclass(frozen=True)
class RoutedTokens:
    """The tokens that one rank routes, and the size of their rows."""

    tokens: int
    hidden: int
    top_k: int
    #: bytes per value in the dtype of the computation
    value: int = 2
    #: bytes of a gate weight
    weight: int = 4
    #: dtype in which rows are sent, as in ``DispatchConfig.wire``
    wire: str = "compute"

    @property
    def out(self) -> int:
        """Bytes of a dispatched row."""
        return {"compute": self.hidden * self.value, "bf16": self.hidden * 2, "fp8": self.hidden + 4}[self.wire]

    @property
    def home(self) -> int:
        """Bytes of a combined row, or of a row's gradient."""
        return self.hidden * (self.value if self.wire == "compute" else 2)


def _exchange(load: RoutedTokens, rows: float, choices: int, ids: bool) -> Bytes:
    """Dispatch of rows with their gate weights (and perhaps ids) and combine of results; the reverse in backward.

    A row is sent together with its weights and ids, and the gradients of rows together with those of weights.
    """
    weights = choices * load.weight
    there = _together(load.out, weights + ids * choices * _ID)
    return Bytes(rows * (there + load.home), rows * (load.home + _together(load.home, weights)))


def _together(row: int, extras: int) -> int:
    """Return the bytes of a row and what travels with it, padded so that any row can be loaded in words of 16 bytes."""
    return -(-(-(-row // _PART) * _PART + extras) // _ROW) * _ROW


def expert_tensor_parallel(load: RoutedTokens, etp: int, rows: float, choices: int) -> Bytes:
    """All-gather of source rows and reduce-scatter of results over the etp axis."""
    return _exchange(replace(load, wire="compute"), (etp - 1) * rows, choices, ids=True)


def local(load: RoutedTokens, etp: int = 1) -> Bytes:
    """Experts that are not split over ranks, except for their width over etp ranks."""
    return expert_tensor_parallel(load, etp, load.tokens, load.top_k)


def all_to_all(load: RoutedTokens, ep: int, etp: int = 1) -> Bytes:
    """One row per choice; the number of chunks makes no difference."""
    rows = load.top_k * load.tokens
    return _exchange(load, rows * (ep - 1) / ep, 1, ids=False) + expert_tensor_parallel(load, etp, rows, 1)


def padded(load: RoutedTokens, ep: int, rows_per_expert: int, num_experts: int) -> Bytes:
    """Exchange of fixed sizes, independent of the routing."""
    return _exchange(load, rows_per_expert * num_experts * (ep - 1) / ep, 1, ids=False)


def all_gather(load: RoutedTokens, ep: int, etp: int = 1) -> Bytes:
    """Every token goes to every rank, independent of the routing."""
    gathered = _exchange(load, (ep - 1) * load.tokens, load.top_k, ids=True)
    return gathered + expert_tensor_parallel(load, etp, ep * load.tokens, load.top_k)


def hierarchical(
    load: RoutedTokens, nodes: int, ranks: int, nodes_each: float, ranks_each: float, etp: int = 1
) -> Bytes:
    """Exchange between ``nodes``, then within a node of ``ranks``.

    A token has choices on ``nodes_each`` different nodes and ``ranks_each`` different ranks.
    """
    between = _exchange(load, load.tokens * nodes_each * (nodes - 1) / nodes, load.top_k, ids=True)
    within = _exchange(load, load.tokens * ranks_each * (ranks - 1) / ranks, load.top_k, ids=True)
    return between + within + expert_tensor_parallel(load, etp, load.tokens * ranks_each, load.top_k)


def drop_duplicates(load: RoutedTokens, tp: int) -> Bytes:
    """All-gather of outputs over ``tp`` ranks that hold the same tokens; each dispatches 1/tp of them."""
    sent = load.tokens * (tp - 1) / tp * load.hidden * load.value
    return Bytes(sent, sent)
