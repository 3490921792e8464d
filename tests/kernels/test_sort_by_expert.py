"""S source rows, K choices per row, R = S*K routed rows, E experts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from equimoe.kernels.sort_by_expert import sort_by_expert

BACKENDS = ("reference", "torch", "auto")


def check(ids_SK: Tensor, num_experts: int, backend: str) -> None:
    """Check what ExpertOrder promises, without sorting."""
    order = sort_by_expert(ids_SK, num_experts, backend=backend)
    flat_R = ids_SK.reshape(-1)
    rows = flat_R.numel()
    assert all(t.dtype == torch.int64 for t in order)
    assert order.order_R.shape == (rows,) and order.inverse_SK.shape == ids_SK.shape
    assert order.offsets_E.shape == (num_experts + 1,)
    assert torch.equal(order.order_R.sort().values, torch.arange(rows)), "a permutation"
    counts_E = torch.stack([(flat_R == e).sum() for e in range(num_experts)])
    assert order.offsets_E[0] == 0 and torch.equal(order.offsets_E.diff(), counts_E)
    for expert in range(num_experts):
        start, stop = order.offsets_E[expert], order.offsets_E[expert + 1]
        assert torch.equal(order.order_R[start:stop], (flat_R == expert).nonzero().squeeze(1)), "stable"
    kept = int(order.offsets_E[-1])
    assert torch.equal(order.order_R[kept:], (flat_R == -1).nonzero().squeeze(1)), "dropped rows last, stable"
    for flat in range(rows):
        row = int(order.inverse_SK.reshape(-1)[flat])
        assert (row == -1) if flat_R[flat] == -1 else (order.order_R[row] == flat)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("ids", "num_experts"),
    [
        (torch.zeros(0, 2, dtype=torch.int64), 3),
        (torch.zeros(4, 0, dtype=torch.int64), 3),
        (torch.zeros(5, 2, dtype=torch.int64), 1),
        (torch.full((5, 2), -1), 4),
        (torch.full((5, 2), 2), 4),
        (torch.tensor([[3, -1], [0, 3], [-1, -1], [3, 3]]), 4),
        (torch.tensor([[1, 0, 2], [0, 1, -1]]).t(), 3),
    ],
    ids=["no rows", "no choices", "one expert", "all dropped", "all on one", "duplicates", "not contiguous"],
)
def test_edges(ids: Tensor, num_experts: int, backend: str) -> None:
    check(ids, num_experts, backend)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), sources=st.integers(0, 12), choices=st.integers(1, 4), num_experts=st.integers(1, 6))
def test_any(data: st.DataObject, sources: int, choices: int, num_experts: int) -> None:
    size = sources * choices
    ids = data.draw(st.lists(st.integers(-1, num_experts - 1), min_size=size, max_size=size))
    for backend in ("reference", "torch"):
        check(torch.tensor(ids, dtype=torch.int64).view(sources, choices), num_experts, backend)


def test_many_rows_are_stable() -> None:
    ids_SK = torch.randint(-1, 7, (5000, 3), generator=torch.Generator().manual_seed(0))
    fast, slow = sort_by_expert(ids_SK, 7), sort_by_expert(ids_SK, 7, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(fast, slow, strict=True))


@pytest.mark.parametrize(
    ("ids", "num_experts", "backend", "message"),
    [
        (torch.zeros(3, 2, dtype=torch.int32), 2, "auto", "int64"),
        (torch.zeros(3, dtype=torch.int64), 2, "auto", r"\[S, K\]"),
        (torch.zeros(3, 2, dtype=torch.int64), 0, "auto", "num_experts=0"),
        (torch.full((3, 2), 2), 2, "auto", "0..1"),
        (torch.full((3, 2), -2), 2, "auto", "-1 for a dropped"),
        (torch.zeros(3, 2, dtype=torch.int64), 2, "fast", "backend='fast'.*'reference', 'torch'"),
    ],
)
def test_mistakes(ids: Tensor, num_experts: int, backend: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sort_by_expert(ids, num_experts, backend=backend)
