"""Permute and combine as gathers. Each is the other's backward, so no sum depends on the order of memory writes."""

# S source rows, K choices per row, D hidden, E experts, R routed rows.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._ops import op
from .._triton import launch_on, next_power_of_2
from ..sort_by_expert import ExpertOrder


@triton.jit(do_not_specialize=["num_rows", "experts"])
def permute_rows(
    x, order, offsets, rows, num_rows, experts, D: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr
):
    """rows[r] = x[order[r] // K]; zero for dropped rows, which start at offsets[experts]."""
    r_R = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    d_D = tl.program_id(1) * BD + tl.arange(0, BD)
    kept_R = r_R < tl.load(offsets + experts)
    source_R = tl.load(order + r_R, mask=r_R < num_rows, other=0) // K
    inside_RD = (r_R < num_rows)[:, None] & (d_D < D)[None, :]
    x_RD = tl.load(x + source_R[:, None] * D + d_D[None, :], mask=inside_RD & kept_R[:, None], other=0.0)
    tl.store(rows + r_R[:, None] * D + d_D[None, :], x_RD, mask=inside_RD)


@triton.jit(do_not_specialize=["sources", "num_rows"])
def combine_rows(
    rows, inverse, y, sources, num_rows, D: tl.constexpr, K: tl.constexpr, SUM: tl.constexpr, BS: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """y[s] = the sum of rows[inverse[s, k]] in the order of k; a dropped or missing row adds zero."""
    s_S = tl.program_id(0).to(tl.int64) * BS + tl.arange(0, BS)
    d_D = tl.program_id(1) * BD + tl.arange(0, BD)
    sum_SD = tl.zeros([BS, BD], SUM)
    for k in range(K):
        row_S = tl.load(inverse + s_S * K + k, mask=s_S < sources, other=-1)
        inside_SD = ((row_S >= 0) & (row_S < num_rows))[:, None] & (d_D < D)[None, :]
        sum_SD += tl.load(rows + row_S[:, None] * D + d_D[None, :], mask=inside_SD, other=0.0).to(SUM)
    inside_SD = (s_S < sources)[:, None] & (d_D < D)[None, :]
    tl.store(y + s_S[:, None] * D + d_D[None, :], sum_SD.to(y.dtype.element_ty), mask=inside_SD)


class Tile(NamedTuple):
    """The rows and columns that one program processes."""

    rows: int
    columns: int
    warps: int


#: by the element size in bytes; each thread has 32 or 64 bytes. Narrower hidden sizes get more rows, not idle columns
TILES = {2: Tile(4, 1024, 4), 4: Tile(4, 512, 4), 8: Tile(4, 256, 4)}
_MAX_ROWS = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tile_for(element_size: int, hidden: int) -> Tile:
    """Return the tile for an element size and a hidden size. It does not depend on the number of rows, which varies."""
    tile = TILES[element_size]
    columns = max(min(tile.columns, next_power_of_2(hidden)), 16)
    return Tile(min(tile.rows * tile.columns // columns, _MAX_ROWS), columns, tile.warps)


_ORDER = "Tensor order, Tensor inverse, Tensor offsets"


@op("permute", schema=f"(Tensor x, {_ORDER}, SymInt num_rows) -> Tensor")
def _permute(x: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
    hidden, choices = x.shape[1], inverse.shape[1]
    rows = torch.empty(num_rows, hidden, dtype=x.dtype, device=x.device)
    if rows.numel():
        tile = tile_for(x.element_size(), hidden)
        grid = (triton.cdiv(num_rows, tile.rows), triton.cdiv(hidden, tile.columns))
        with launch_on(x):
            permute_rows[grid](
                x.contiguous(), order.contiguous(), offsets.contiguous(), rows, num_rows, offsets.numel() - 1,
                D=hidden, K=choices, BR=tile.rows, BD=tile.columns, num_warps=tile.warps,
            )  # fmt: skip
    return rows


@_permute.register_fake
def _fake_permute(x: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
    return torch.empty(num_rows, x.shape[1], dtype=x.dtype, device=x.device)


def sum_rows(rows: Tensor, inverse: Tensor) -> Tensor:
    """Sum rows[inverse[s, k]] in the order of k: [S, D]. An inverse of -1 adds nothing."""
    (sources, choices), (num_rows, hidden) = inverse.shape, rows.shape
    y = torch.empty(sources, hidden, dtype=rows.dtype, device=rows.device)
    if y.numel():
        tile = tile_for(rows.element_size(), hidden)
        grid = (triton.cdiv(sources, tile.rows), triton.cdiv(hidden, tile.columns))
        with launch_on(rows):
            combine_rows[grid](
                rows.contiguous(), inverse.contiguous(), y, sources, num_rows, D=hidden, K=choices,
                SUM=_sum_dtype(rows.element_size()), BS=tile.rows, BD=tile.columns, num_warps=tile.warps,
            )  # fmt: skip
    return y


@op("combine", schema=f"(Tensor rows, {_ORDER}) -> Tensor")
def _combine(rows: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor) -> Tensor:
    return sum_rows(rows, inverse)


@_combine.register_fake
def _fake_combine(rows: Tensor, order: Tensor, inverse: Tensor, offsets: Tensor) -> Tensor:
    return torch.empty(inverse.shape[0], rows.shape[1], dtype=rows.dtype, device=rows.device)


def _sum_dtype(element_size: int) -> tl.dtype:
    return tl.float64 if element_size == 8 else tl.float32


def _save_permute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:4])


def _differentiate_permute(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
    return _combine(drows, *ctx.saved_tensors), None, None, None, None


def _save_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])
    ctx.num_rows = inputs[0].shape[0]


def _differentiate_combine(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _permute(dy, *ctx.saved_tensors, ctx.num_rows), None, None, None


_permute.register_autograd(_differentiate_permute, setup_context=_save_permute)
_combine.register_autograd(_differentiate_combine, setup_context=_save_combine)


def _check(rows: Tensor) -> None:
    if rows.dtype not in _DTYPES:
        raise ValueError(f"rows={rows.dtype}: backend='triton' has fp32, bf16, fp16 and fp64; use backend='torch'")


def permute(x_SD: Tensor, order: ExpertOrder, num_rows: int) -> Tensor:
    _check(x_SD)
    return _permute(x_SD, *order, num_rows)


def combine(rows_RD: Tensor, order: ExpertOrder) -> Tensor:
    _check(rows_RD)
    return _combine(rows_RD, *order)
