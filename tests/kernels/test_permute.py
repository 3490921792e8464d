"""S source rows, K choices per row, D hidden, R = S*K routed rows, E experts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from equimoe.kernels.permute import combine, permute
from equimoe.kernels.sort_by_expert import ExpertOrder, sort_by_expert

BACKENDS = ("reference", "torch")
#: largest permitted relative error of a row
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def make(
    sources: int, choices: int, experts: int, hidden: int, dtype: torch.dtype, drop: float = 0.0
) -> tuple[Tensor, ExpertOrder]:
    torch.manual_seed(sources + 10 * choices + 100 * experts)
    ids_SK = torch.randint(0, experts, (sources, choices))
    ids_SK[torch.rand(sources, choices) < drop] = -1
    return torch.randn(sources, hidden, dtype=torch.float64).to(dtype), sort_by_expert(ids_SK, experts)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype and found.shape == expected.shape
    error, scale = (found.double() - expected.double()).norm(dim=1), expected.double().norm(dim=1)
    assert torch.equal(error[scale == 0], torch.zeros_like(error[scale == 0])), (
        "rows without contributions must be exactly zero"
    )
    assert (error <= TOLERANCE[dtype] * scale).all()


SHAPES = [(63, 2, 3, 31), (1, 1, 1, 8), (0, 2, 4, 8), (17, 5, 5, 33), (64, 2, 16, 32), (9, 1, 4, 1)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("drop", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_ways_and_both_gradients(
    shape: tuple[int, int, int, int], drop: float, dtype: torch.dtype, backend: str
) -> None:
    sources, choices, experts, hidden = shape
    x_SD, order = make(sources, choices, experts, hidden, dtype, drop)
    kept = int(order.offsets_E[-1])
    x_SD.requires_grad_()
    for num_rows in {None, kept}:
        rows_RD = permute(x_SD, order, num_rows, backend=backend)
        expected_RD = torch.zeros(sources * choices, hidden, dtype=dtype)
        expected_RD[:kept] = x_SD.detach()[order.order_R[:kept] // choices]
        assert torch.equal(rows_RD, expected_RD[:num_rows]), "copies, and zero where dropped"

        g_RD = torch.randn(rows_RD.shape, dtype=torch.float64).to(dtype)
        wide_RD = torch.zeros(sources * choices + 1, hidden, dtype=torch.float64)
        wide_RD[:kept] = g_RD[:kept].double()
        sums_SD = wide_RD[order.inverse_SK].sum(1)  # -1 selects the last row, which is zero
        (dx_SD,) = torch.autograd.grad(rows_RD, x_SD, g_RD)
        close(dx_SD, sums_SD, dtype)

        back_RD = g_RD.clone().requires_grad_()
        y_SD = combine(back_RD, order, backend=backend)
        close(y_SD, sums_SD, dtype)
        dy_SD = torch.randn(y_SD.shape, dtype=torch.float64).to(dtype)
        (drows_RD,) = torch.autograd.grad(y_SD, back_RD, dy_SD)
        expected_RD[:kept] = dy_SD[order.order_R[:kept] // choices]
        assert torch.equal(drows_RD, expected_RD[:num_rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("drop", [0.0, 0.01])
def test_sums_accumulate_in_fp32(dtype: torch.dtype, drop: float) -> None:
    """Accumulated in 16 bits, a sum of ones would stay at 256 (bf16) or 2048 (fp16)."""
    choices = 4097
    ids_SK = torch.zeros(2, choices, dtype=torch.int64)
    ids_SK[1, -1] = -1 if drop else 0
    order = sort_by_expert(ids_SK, 1)
    y_SD = combine(torch.ones(2 * choices, 8, dtype=dtype), order)
    assert torch.equal(y_SD[0], torch.full((8,), 4097.0).to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_rows_may_hold_anything(backend: str) -> None:
    x_SD, order = make(20, 2, 3, 8, torch.float32, drop=0.5)
    kept = int(order.offsets_E[-1])
    rows_RD = permute(x_SD, order).index_fill(0, torch.arange(kept, 40), float("nan"))
    assert torch.equal(combine(rows_RD, order, backend=backend), combine(rows_RD[:kept], order, backend=backend))


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_strides(drop: float) -> None:
    x_SD, order = make(30, 2, 4, 12, torch.float32, drop)
    wide = torch.randn(12, 60)
    strided_SD = x_SD.t().contiguous().t()
    assert torch.equal(permute(strided_SD, order), permute(x_SD, order))
    assert torch.equal(combine(wide.t(), order), combine(wide.t().contiguous(), order))
    x_SD.requires_grad_()
    permute(x_SD, order).sum().backward()  # sum() sends back an expanded gradient
    kept_S = (order.inverse_SK >= 0).sum(1).float()
    assert torch.equal(x_SD.grad, kept_S[:, None].expand(30, 12))
    rows_RD = torch.randn(60, 12, requires_grad=True)
    combine(rows_RD, order).sum().backward()
    assert torch.equal(rows_RD.grad.sum(), order.offsets_E[-1] * 12.0)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    sources=st.integers(0, 9),
    choices=st.integers(1, 4),
    experts=st.integers(1, 5),
    hidden=st.integers(1, 9),
    drop=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_gradcheck(sources: int, choices: int, experts: int, hidden: int, drop: float) -> None:
    x_SD, order = make(sources, choices, experts, hidden, torch.float64, drop)
    if sources == 0:
        assert permute(x_SD, order).shape == (0, hidden) and combine(x_SD, order).shape == (0, hidden)
        return
    rows_RD = torch.randn(sources * choices, hidden, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: permute(x, order), x_SD.requires_grad_())
    assert torch.autograd.gradcheck(lambda rows: combine(rows, order), rows_RD)


def test_repeats_bit_for_bit() -> None:
    x_SD, order = make(500, 4, 8, 40, torch.float32, drop=0.1)
    x_SD.requires_grad_()
    runs = []
    for _ in range(3):
        y_SD = combine(permute(x_SD, order), order)
        runs.append((y_SD, *torch.autograd.grad(y_SD, x_SD, x_SD.detach())))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_mistakes() -> None:
    x_SD, order = make(6, 2, 3, 4, torch.float32, drop=0.2)
    kept = int(order.offsets_E[-1])
    assert 0 < kept < 12
    with pytest.raises(ValueError, match="6 source rows"):
        permute(x_SD[1:], order)
    with pytest.raises(ValueError, match="num_rows=13"):
        permute(x_SD, order, 13)
    with pytest.raises(ValueError, match="at most 12"):
        combine(torch.zeros(13, 4), order)
    with pytest.raises(ValueError, match=f"keeps {kept} rows"):
        combine(torch.zeros(kept - 1, 4), order)
    with pytest.raises(ValueError, match="backend='x'"):
        permute(x_SD, order, backend="x")
    with pytest.raises(ValueError, match="backend='x'"):
        combine(torch.zeros(12, 4), order, backend="x")


def test_no_second_derivative() -> None:
    x_SD, order = make(6, 2, 3, 4, torch.float64)
    (grad,) = torch.autograd.grad(permute(x_SD.requires_grad_(), order).square().sum(), x_SD, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
