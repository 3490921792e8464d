"""The triton and torch backends against the fp64 reference; on the CPU under Triton's interpreter.

R rows sorted by expert, E experts, K in width, N out width, S source rows.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from equimoe.kernels.grouped_gemm import grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad
from equimoe.kernels.matmul_tiles import ARCHS, OPS, shipped_tile
from tests.helpers.slow import slow_but

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: largest permitted error: relative by norm, and of the worst row relative to the rows' root mean square
TOLERANCE = {torch.float32: (2e-6, 1e-5), torch.bfloat16: (8e-3, 2e-2), torch.float16: (5e-4, 3e-3)}
COUNTS = [(20, 0, 1, 33), (0, 0, 0, 0), (16,), (0, 32, 5, 0, 0, 17, 1)]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def offsets(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *counts], device=DEVICE).cumsum(0)


def close(found: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    by_norm, by_row = TOLERANCE[dtype]
    assert found.shape == want.shape and found.isfinite().all()
    assert (found[want == 0] == 0).all()
    error, want = found.double() - want, want.double()
    assert error.norm() <= by_norm * want.norm()
    error_N, scale_N = (t.reshape(-1, want.shape[-1]).norm(dim=1) for t in (error, want))
    if (scale_N > 0).any():
        assert error_N.max() <= by_row * scale_N[scale_N > 0].square().mean().sqrt()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", slow_but([torch.float32, torch.bfloat16], TOLERANCE))
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("counts", COUNTS)
def test_against_fp64(counts: tuple[int, ...], gathered: bool, dtype: torch.dtype, backend: str) -> None:
    kept, experts, dropped, n, k = sum(counts), len(counts), 3, 19, 37
    num_rows = kept + dropped
    index_R = torch.randint(0, 9, (num_rows,), device=DEVICE) if gathered else None
    rows, weight = randn(9 if gathered else num_rows, k, dtype=dtype), randn(experts, n, k, dtype=dtype)
    dy, bounds = randn(num_rows, n, dtype=dtype), offsets(counts)
    wide = [t.double().requires_grad_() for t in (rows, weight)]
    want = grouped_gemm(*wide, bounds, index_R, backend="reference")
    wants = torch.autograd.grad(want, wide, dy.double())
    narrow = [t.clone().requires_grad_() for t in (rows, weight)]
    found = grouped_gemm(*narrow, bounds, index_R, backend=backend)
    grads = torch.autograd.grad(found, narrow, dy)
    assert found.dtype == grads[0].dtype == grads[1].dtype == dtype
    assert (found[kept:] == 0).all(), "rows of no expert"
    for got, expected in zip((found.detach(), *grads), (want.detach(), *wants), strict=True):
        close(got, expected, dtype)
    drows = grouped_gemm_dgrad(dy, weight, bounds, backend=backend)
    close(drows, grouped_gemm_dgrad(dy.double(), weight.double(), bounds, backend="reference"), dtype)
    for e, count in enumerate(counts):
        assert count or (grads[1][e] == 0).all(), "an expert without rows"


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_weight_gradient_gathers_either_side_and_adds(backend: str) -> None:
    bounds, num_rows = offsets((7, 0, 40)), 50
    left, right = (torch.randint(0, size, (num_rows,), device=DEVICE) for size in (11, 13))
    dy, rows, before = randn(11, 18), randn(13, 33), randn(3, 18, 33)
    want = grouped_gemm_wgrad(dy.double(), rows.double(), bounds, left, right, backend="reference")
    close(grouped_gemm_wgrad(dy, rows, bounds, left, right, backend=backend), want, torch.float32)
    out = before.clone()
    assert grouped_gemm_wgrad(dy, rows, bounds, left, right, out, backend=backend) is out
    close(out, want + before.double(), torch.float32)
    assert torch.equal(out[1], before[1]), "an expert without rows does not change the buffer"
    narrow = grouped_gemm_wgrad(dy.bfloat16(), rows.bfloat16(), bounds, left, right, before.clone(), backend=backend)
    close(narrow, want + before.double(), torch.bfloat16)


def test_nan_stays_within_its_expert() -> None:
    bounds = offsets((5, 6))
    rows, dy, weight = randn(20, 18), randn(20, 17), randn(2, 17, 18)
    rows[5:6], dy[5:6], rows[11:], dy[11:] = (float("nan"),) * 4
    out = grouped_gemm(rows, weight, bounds, backend="triton")
    assert out[:5].isfinite().all() and out[6:11].isfinite().all() and (out[11:] == 0).all()
    assert out[5].isnan().all()
    grad = grouped_gemm_wgrad(dy, rows, bounds, backend="triton")
    assert grad[0].isfinite().all() and grad[1].isnan().all()


def test_compiles_in_one_graph_and_repeats_bit_for_bit() -> None:
    bounds = offsets((9, 0, 12))

    def step(rows: Tensor, weight: Tensor) -> Tensor:
        return grouped_gemm(rows, weight, bounds, backend="triton").square().sum()

    inputs = [randn(21, 17).requires_grad_(), randn(3, 20, 17).requires_grad_()]
    eager, again = (torch.autograd.grad(step(*inputs), inputs) for _ in range(2))
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for a, b, c in zip(eager, again, compiled, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


def test_custom_ops() -> None:
    """Schemas and fake implementations agree with the ops, for fixed and symbolic sizes."""
    bounds, rows, weight, dy = offsets((3, 0, 2)), randn(6, 8), randn(3, 7, 8), randn(6, 7)
    index_R, sources = torch.randint(0, 4, (6,), device=DEVICE), randn(4, 8)
    grouped_gemm(rows, weight, bounds, backend="triton")  # registers the ops
    for op, arguments in (
        ("grouped_gemm", (rows, weight, bounds, None)),
        ("grouped_gemm", (sources, weight, bounds, index_R)),
        ("grouped_gemm_dgrad", (dy, weight, bounds)),
        ("grouped_gemm_wgrad", (dy, rows, bounds, None, None)),
        ("grouped_gemm_wgrad", (dy, sources, bounds, None, index_R)),
        ("grouped_gemm_wgrad_", (dy, rows, bounds, None, None, randn(3, 7, 8))),
    ):
        torch.library.opcheck(getattr(torch.ops.equimoe, op).default, arguments)


def test_mistakes() -> None:
    bounds, rows, weight = offsets((2, 2)), randn(4, 8), randn(2, 6, 8)
    for arguments, message in (
        ((rows, weight[:1], bounds), "needs 2 experts"),
        ((rows[:, :5], weight, bounds), "5 in dimension 2"),
        ((rows.bfloat16(), weight, bounds), "the same dtype"),
        ((rows, weight, bounds.int()), "int64"),
    ):
        with pytest.raises(ValueError, match=message):
            grouped_gemm(*arguments)
    with pytest.raises(ValueError, match="equally many"):
        grouped_gemm_wgrad(rows[:2], rows, bounds)
    with pytest.raises(ValueError, match="contiguous fp32"):
        grouped_gemm_wgrad(rows, rows, bounds, out=weight)
    with pytest.raises(ValueError, match="use backend='torch'"):
        grouped_gemm(rows.double(), weight.double(), bounds, backend="triton")


@pytest.mark.parametrize("arch", ARCHS)
def test_the_table_covers_every_case(arch: str) -> None:
    for dtype in TOLERANCE:
        for rows_per_expert in (0, 1, 255, 256, 10**6):
            tiles = {op: shipped_tile(op, arch, dtype, rows_per_expert) for op in OPS}
            assert all(size >= 16 and size & (size - 1) == 0 for tile in tiles.values() for size in tile[:3])
