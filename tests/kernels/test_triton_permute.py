"""S source rows, K choices per row, D hidden, R = S*K routed rows, E experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from equimoe.kernels.permute import combine, permute  # noqa: E402
from equimoe.kernels.sort_by_expert import ExpertOrder, sort_by_expert  # noqa: E402
from tests.helpers.slow import slow_but  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU, Triton's interpreter runs the kernels
#: largest permitted relative error of a row
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def make(
    sources: int, choices: int, experts: int, hidden: int, dtype: torch.dtype, drop: float = 0.0
) -> tuple[Tensor, ExpertOrder]:
    ids_SK = torch.randint(0, experts, (sources, choices), device=DEVICE)
    ids_SK[torch.rand(sources, choices, device=DEVICE) < drop] = -1
    x_SD = torch.randn(sources, hidden, dtype=torch.float64, device=DEVICE).to(dtype)
    return x_SD, sort_by_expert(ids_SK, experts, backend="torch")


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype and found.shape == expected.shape
    error, scale = (found.double() - expected.double()).norm(dim=1), expected.double().norm(dim=1)
    assert (error <= TOLERANCE[dtype] * scale).all()  # so rows without contributions are exactly zero


SHAPES = [(63, 2, 3, 31), (1, 1, 1, 8), (0, 2, 4, 8), (17, 5, 5, 33), (9, 1, 4, 1), (11, 3, 4, 1100)]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("drop", "dtype"),
    slow_but(
        [(0.0, torch.float32), (0.4, torch.bfloat16), (1.0, torch.float16)],
        [*((0.4, dtype) for dtype in TOLERANCE), (0.0, torch.float32), (1.0, torch.float16)],
    ),
)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_ways_and_both_gradients(shape: tuple[int, int, int, int], drop: float, dtype: torch.dtype) -> None:
    sources, choices, experts, hidden = shape
    x_SD, order = make(sources, choices, experts, hidden, dtype, drop)
    kept, rows = int(order.offsets_E[-1]), sources * choices
    x_SD.requires_grad_()
    for num_rows in {None, kept}:
        rows_RD = permute(x_SD, order, num_rows, backend="triton")
        expected_RD = torch.zeros(rows, hidden, dtype=dtype, device=DEVICE)
        expected_RD[:kept] = x_SD.detach()[order.order_R[:kept] // choices]
        assert torch.equal(rows_RD, expected_RD[:num_rows]), "copies, and zero where dropped"

        g_RD = torch.randn(rows_RD.shape, dtype=torch.float64, device=DEVICE).to(dtype)
        wide_RD = torch.zeros(rows + 1, hidden, dtype=torch.float64, device=DEVICE)
        wide_RD[:kept] = g_RD[:kept].double()
        sums_SD = wide_RD[order.inverse_SK].sum(1)  # -1 selects the last row, which is zero
        (dx_SD,) = torch.autograd.grad(rows_RD, x_SD, g_RD)
        close(dx_SD, sums_SD, dtype)

        back_RD = g_RD.clone().requires_grad_()
        y_SD = combine(back_RD, order, backend="triton")
        close(y_SD, sums_SD, dtype)
        dy_SD = torch.randn(y_SD.shape, dtype=torch.float64, device=DEVICE).to(dtype)
        (drows_RD,) = torch.autograd.grad(y_SD, back_RD, dy_SD)
        expected_RD[:kept] = dy_SD[order.order_R[:kept] // choices]
        assert torch.equal(drows_RD, expected_RD[:num_rows])


@pytest.mark.parametrize(
    ("dtype", "choices"), slow_but([(torch.bfloat16, 300)], [(torch.bfloat16, 300), (torch.float16, 2065)])
)
def test_sums_accumulate_in_fp32(dtype: torch.dtype, choices: int) -> None:
    """Accumulated in 16 bits, a sum of ones would stay at 256 (bf16) or 2048 (fp16)."""
    order = sort_by_expert(torch.zeros(1, choices, dtype=torch.int64, device=DEVICE), 1)
    y_SD = combine(torch.ones(choices, 8, dtype=dtype, device=DEVICE), order, backend="triton")
    assert torch.equal(y_SD[0], torch.full((8,), float(choices), device=DEVICE).to(dtype))


def test_dropped_rows_may_hold_anything() -> None:
    x_SD, order = make(20, 2, 3, 8, torch.float32, drop=0.5)
    kept = int(order.offsets_E[-1])
    rows_RD = permute(x_SD, order, backend="triton")
    rows_RD[kept:] = float("nan")
    assert torch.equal(combine(rows_RD, order, backend="triton"), combine(rows_RD[:kept], order, backend="triton"))


def test_fewer_rows_than_kept_leave_the_others_without_gradient() -> None:
    x_SD, order = make(12, 2, 3, 8, torch.float32)
    x_SD.requires_grad_()
    permute(x_SD, order, 10, backend="triton").sum().backward()  # sum() sends back an expanded gradient
    copies_S = torch.bincount(order.order_R[:10] // 2, minlength=12).float()
    assert torch.equal(x_SD.grad, copies_S[:, None].expand(12, 8))


def test_strides_and_repeats() -> None:
    x_SD, order = make(30, 2, 4, 12, torch.float32, 0.3)
    strided_SD = x_SD.t().contiguous().t()
    rows_RD = permute(x_SD, order, backend="triton")
    assert torch.equal(permute(strided_SD, order, backend="triton"), rows_RD)
    wide = torch.randn(12, 60, device=DEVICE)
    first, second = (combine(rows, order, backend="triton") for rows in (wide.t(), wide.t().contiguous()))
    assert torch.equal(first, second)


def test_second_derivative() -> None:
    """Both ops are linear and each other's backward, so derivatives of any order exist."""
    x_SD, order = make(3, 2, 3, 2, torch.float64, 0.3)
    assert torch.autograd.gradcheck(lambda x: permute(x, order, backend="triton"), x_SD.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x: permute(x, order, backend="triton").pow(2), x_SD)


def test_mistakes() -> None:
    x_SD, order = make(6, 2, 3, 4, torch.float32)
    with pytest.raises(ValueError, match="num_rows=13"):
        permute(x_SD, order, 13, backend="triton")
    with pytest.raises(ValueError, match="backend='x'.*'triton'"):
        combine(torch.zeros(12, 4, device=DEVICE), order, backend="x")


def test_without_a_gpu_compiled_kernels_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    x_SD, order = make(6, 2, 3, 4, torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="move them to a GPU or use backend='torch'"):
        permute(x_SD.cpu(), ExpertOrder(*(t.cpu() for t in order)), backend="triton")
