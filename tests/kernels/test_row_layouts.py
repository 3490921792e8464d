"""The accelerators' grouped products, which run on the CPU, too, agree with the CPU's own.

R rows sorted by expert, E experts, K in width, N out width, S source rows.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from equimoe.kernels.grouped_gemm import accelerator, row_layouts, torch_ops

from .mlp_cases import NoHostReads

#: largest permitted relative difference by norm
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
COUNTS = [(20, 0, 1, 33), (0, 0, 0), (16,), (0, 32, 5, 0, 17, 1), (0, 0, 7), (40, 0, 0)]
#: torch's grouped product takes widths 16 and 24 in bf16; it never takes 19 and 37
WIDTHS = [(24, 16), (19, 37)]


def offsets(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def close(found: Tensor, want: Tensor) -> None:
    assert found.dtype == want.dtype and found.shape == want.shape
    assert (found.double() - want.double()).norm() <= TOLERANCE[want.dtype] * want.double().norm()


def test_which_layout() -> None:
    bounds = offsets((3, 4))
    assert type(row_layouts.row_layout(bounds, 7, torch.bfloat16, 24, 16)) is row_layouts.GroupedLayout
    for dtype, width in ((torch.bfloat16, 19), (torch.float16, 16), (torch.float32, 16)):
        assert type(row_layouts.row_layout(bounds, 7, dtype, 24, width)) is row_layouts.BlockLayout


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("counts", COUNTS)
def test_same_as_on_the_cpu(
    counts: tuple[int, ...], gathered: bool, widths: tuple[int, int], dtype: torch.dtype
) -> None:
    (n, k), kept, experts = widths, sum(counts), len(counts)
    num_rows, bounds = kept + 3, offsets(counts)  # the last three belong to no expert
    index_R, dy_index_R = (torch.randint(0, 9, (num_rows,)) if gathered else None for _ in range(2))
    sources = 9 if gathered else num_rows
    rows, weight = torch.randn(sources, k).to(dtype), torch.randn(experts, n, k).to(dtype)
    dy, dy_RN = torch.randn(sources, n).to(dtype), torch.randn(num_rows, n).to(dtype)
    arguments = (dy, rows, bounds, dy_index_R, index_R)
    before = torch.randn(experts, n, k)
    with NoHostReads():
        out = accelerator.forward(rows, weight, bounds, index_R)
        drows = accelerator.forward(dy_RN, weight.mT, bounds, None)
        grad = accelerator.wgrad(*arguments, None)
        added = accelerator.wgrad(*arguments, before.clone()) if dtype != torch.float64 else before
    close(out, torch_ops.forward(rows, weight, bounds, index_R))
    close(drows, torch_ops.dgrad(dy_RN, weight, bounds))
    close(grad, torch_ops.wgrad(*arguments, None))
    assert (out[kept:] == 0).all() and (drows[kept:] == 0).all()
    for e, count in enumerate(counts):
        assert count or ((grad[e] == 0).all() and torch.equal(added[e], before[e]))
    if dtype != torch.float64:
        wide = torch_ops.wgrad(*arguments, before.clone())
        assert (added - wide).norm() <= 1e-6 * wide.norm(), "accumulates in fp32 for rows of any dtype"


def test_nothing_to_multiply() -> None:
    bounds, weight, none = offsets((0, 0)), torch.randn(2, 5, 4), torch.empty(0, 4)
    before = torch.randn(2, 5, 4)
    assert accelerator.forward(none, weight, bounds, None).shape == (0, 5)
    assert torch.equal(accelerator.wgrad(torch.empty(0, 5), none, bounds, None, None, None), torch.zeros(2, 5, 4))
    assert torch.equal(accelerator.wgrad(torch.empty(0, 5), none, bounds, None, None, before.clone()), before)


@pytest.mark.parametrize("kind", [row_layouts.GroupedLayout, row_layouts.BlockLayout])
def test_nan_stays_within_its_expert(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "row_layout", lambda bounds, num_rows, *_: kind(bounds, num_rows))
    bounds = offsets((5, 1, 40, 7))
    rows, dy, weight = (torch.randn(*shape).bfloat16() for shape in ((60, 16), (60, 24), (4, 24, 16)))
    rows[5], rows[53:], dy[5], dy[53:] = (float("nan"),) * 4  # expert 1's row, and the rows of no expert
    out = accelerator.forward(rows, weight, bounds, None)
    assert out[5].isnan().all() and (out[53:] == 0).all()
    assert out[:5].isfinite().all() and out[6:53].isfinite().all()
    grad = accelerator.wgrad(dy, rows, bounds, None, None, None)
    assert grad[1].isnan().all() and grad[[0, 2, 3]].isfinite().all()


def test_other_devices_take_it() -> None:
    """Meta tensors have no values, so the host cannot have read any."""
    rows, weight, bounds = (t.to("meta") for t in (torch.randn(60, 16), torch.randn(4, 24, 16), offsets((1, 2, 3, 4))))
    assert torch_ops.forward(rows, weight, bounds, None).shape == (60, 24)
    assert torch_ops.dgrad(torch.empty(60, 24, device="meta"), weight, bounds).shape == (60, 16)
    assert torch_ops.wgrad(torch.empty(60, 24, device="meta"), rows, bounds, None, None, None).shape == (4, 24, 16)
