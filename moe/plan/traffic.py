"""Bytes that a rank sends to other ranks in one layer's step, in closed form, for a balanced routing.

T tokens of a rank, D hidden, K top-k, e expert-parallel ranks, g expert-tensor-parallel ranks, S source rows of a rank.
With rows alone, as they are computed, the forward of :func:`all_to_all` is K T D [2 (e - 1)/e + 2 (g - 1)] values (MoE
Parallel Folding, arXiv 2504.14960). Counts that are exchanged are left out: 8 bytes per expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

_ID = 4


class Bytes(NamedTuple):
    """Of a forward and of a backward pass."""

    forward: float
    backward: float

    def __add__(self, other: tuple) -> Bytes:
        return Bytes(*(mine + its for mine, its in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Load:
    """What one rank routes."""

    tokens: int
    hidden: int
    top_k: int
    #: bytes of a value as it is computed, and of a router weight
    value: int = 2
    weight: int = 4
    #: ``DispatchConfig.wire``
    wire: str = "compute"

    @property
    def out(self) -> int:
        """Bytes of a row on its way to the experts."""
        return {"compute": self.hidden * self.value, "bf16": self.hidden * 2, "fp8": self.hidden + 4}[self.wire]

    @property
    def home(self) -> int:
        """Bytes of a result, or of a gradient."""
        return self.hidden * (self.value if self.wire == "compute" else 2)


def _exchange(load: Load, rows: float, choices: int, ids: bool) -> Bytes:
    """Rows with the weights, and perhaps the ids, of their choices there, and results home; gradients the other way."""
    weights = choices * load.weight
    return Bytes(
        rows * (load.out + weights + ids * choices * _ID + load.home), rows * (load.home + load.home + weights)
    )


def expert_tensor_parallel(load: Load, etp: int, rows: float, choices: int) -> Bytes:
    """All-gather of a rank's source rows, and reduce-scatter of results, over the etp axis."""
    return _exchange(replace(load, wire="compute"), (etp - 1) * rows, choices, ids=True)


def local(load: Load, etp: int = 1) -> Bytes:
    """Experts that are not split over ranks, or only their width."""
    return expert_tensor_parallel(load, etp, load.tokens, load.top_k)


def all_to_all(load: Load, ep: int, etp: int = 1) -> Bytes:
    """One row per choice, in however many chunks."""
    rows = load.top_k * load.tokens
    return _exchange(load, rows * (ep - 1) / ep, 1, ids=False) + expert_tensor_parallel(load, etp, rows, 1)


def padded(load: Load, ep: int, rows_per_expert: int, num_experts: int) -> Bytes:
    """Fixed sizes, whatever was routed."""
    return _exchange(load, rows_per_expert * num_experts * (ep - 1) / ep, 1, ids=False)


def all_gather(load: Load, ep: int, etp: int = 1) -> Bytes:
    """Every token to every rank, whatever was routed."""
    gathered = _exchange(load, (ep - 1) * load.tokens, load.top_k, ids=True)
    return gathered + expert_tensor_parallel(load, etp, ep * load.tokens, load.top_k)


def hierarchical(load: Load, nodes: int, ranks: int, nodes_each: float, ranks_each: float, etp: int = 1) -> Bytes:
    """``nodes`` of ``ranks``; a token chooses on ``nodes_each`` different nodes and ``ranks_each`` different ranks."""
    between = _exchange(load, load.tokens * nodes_each * (nodes - 1) / nodes, load.top_k, ids=True)
    within = _exchange(load, load.tokens * ranks_each * (ranks - 1) / ranks, load.top_k, ids=True)
    return between + within + expert_tensor_parallel(load, etp, load.tokens * ranks_each, load.top_k)


def drop_duplicates(load: Load, tp: int) -> Bytes:
    """Outputs gathered over ``tp`` ranks that hold the same tokens; what is dispatched is 1/tp of them."""
    share = load.tokens * (tp - 1) / tp * load.hidden * load.value
    return Bytes(share, share)
