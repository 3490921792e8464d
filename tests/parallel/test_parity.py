"""Checks that every composition of parallelisms equals one process that holds the whole batch."""

from __future__ import annotations

import pytest

from tests.helpers.compositions import COMPOSITIONS
from tests.helpers.parity import compare
from tests.helpers.slow import slow_but

#: together these cover every axis, dispatcher and precision, capacity, recomputation, and a rank without tokens
FAST = (
    "dp 4, ep 2, recompute",
    "dp 2, ep 2, sequence scope",
    "dp 2, ep 2, capacity",
    "dp 2, ep 2, bf16",
    "fsdp 2, tp 2, ep 4, recompute, exchanges kept",
    "fssdp, dp 4, no tokens on a rank",
    "fssdp, fsdp 2, bf16, calibrated, replicas freed",
    "hsdp 2 x 2, ep 2",
    "tp 2, ep 2 > dp 1",
    "cp 2, ring",
    "cp 2, dp 2, ep 4, no tokens on a rank",
    "dp 2, etp 2",
    "tp 2, no sp, ep 2",
    "all_gather, dp 4, ep 4",
    "hierarchical, 2 nodes, dp 4, ep 4",
    "overlapped 2, dp 2, ep 2",
    "cosine (X-MoE), dp 2, ep 2, recompute",
    "top-p (HMoE), dp 2, ep 2, recompute",
    "expert choice, dp 2, ep 2, recompute",
    "hash, pp 2, tp 2, ep 2 > dp 1, recompute",
    "slots (SoftMoE), dp 2, ep 2, recompute",
    "zero-computation experts (MoE++), dp 2, ep 2, recompute",
    "zero-computation experts (MoE++), dp 4, ep 4, capacity of all ranks",
    "unequal widths (HMoE), dp 2, ep 2, recompute",
    "unequal widths (HMoE), dp 4, ep 4",
    "pp 2, 1f1b, recompute",
    "pp 2, dp 2, ep 2",
    "documents, cp 2, ring, few labels",
    "documents, pp 2, 1f1b, recompute, few labels",
)
#: eight ranks, in compositions that others also cover; benchmarks/parallel/parity.py runs them
REST = (
    "dp 8, ep 4, edp 2",
    "fssdp, dp 8, three experts",
    "tp 2, hsdp 2 x 2, ep 2",
    "cp 2, tp 2, hsdp 2 x 1, ep 4",
    "cp 2, tp 2, dp 2, ep 8 > dp 2",
    "hierarchical, 2 nodes, tp 2, fsdp 4, ep 8",
    "pp 4, dp 2, ep 2",
    "pp 2, tp 2, fsdp 2, ep 4 > dp 2",
    "documents, pp 2, cp 2, tp 2, ep 2, etp 2",
)


@pytest.mark.parametrize("name", slow_but(FAST, [name for name in COMPOSITIONS if name not in REST]))
def test_equals_one_process(name: str) -> None:
    """Compare loss and norm of three steps, the first's gradients, and the final parameters."""
    of = COMPOSITIONS[name]
    found = compare(of)
    assert max(found.values()) < of.limit, found
