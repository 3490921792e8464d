"""Permute and combine as gathers. Each is the other's backward, so no sum depends on the order of memory writes."""

# S source rows, K choices per row, D hidden, R routed rows.

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._autograd import result
from ..checks import readable
from ..cpu.memory import empty
from ..sort_by_expert import ExpertOrder


def _permute(x_SD: Tensor, order: ExpertOrder, num_rows: int) -> Tensor:
    """Return the source row of each sorted row, [num_rows, D]; zero for dropped rows."""
    choices = max(order.inverse_SK.shape[1], 1)
    rows_RD = empty(num_rows, x_SD.shape[1], like=x_SD)
    if num_rows == 0:
        return rows_RD
    torch.index_select(x_SD, 0, order.order_R[:num_rows] // choices, out=rows_RD)
    if readable(order.offsets_E):
        if (kept := int(order.offsets_E[-1])) < num_rows:
            rows_RD[kept:] = 0
        return rows_RD
    dropped_R = torch.arange(num_rows, device=x_SD.device) >= order.offsets_E[-1]
    return rows_RD.masked_fill_(dropped_R[:, None], 0)


def sum_rows(rows_RD: Tensor, inverse_SK: Tensor, all_kept: bool = False) -> Tensor:
    """Sum rows[inverse[s, k]] over k: [S, D], accumulated in fp32 (fp64 for fp64 rows).

    A negative inverse contributes zero. ``all_kept`` promises that there is none.
    """
    sources, choices = inverse_SK.shape
    if rows_RD.shape[0] == 0 or inverse_SK.numel() == 0:
        return rows_RD.new_zeros(sources, rows_RD.shape[1])
    if all_kept and rows_RD.device.type == "cpu":  # one pass over the rows, accumulating in fp32
        return F.embedding_bag(inverse_SK, rows_RD, mode="sum")
    if rows_RD.device.type != "cpu":
        return sum_bags(rows_RD, inverse_SK)
    wide = torch.float64 if rows_RD.dtype == torch.float64 else torch.float32
    y_SD = torch.zeros(sources, rows_RD.shape[1], dtype=wide, device=rows_RD.device)
    for k in range(choices):
        row_S = inverse_SK[:, k]
        term_SD = rows_RD.index_select(0, row_S.clamp(min=0)).masked_fill_((row_S < 0)[:, None], 0)
        y_SD.add_(term_SD)
    return y_SD.to(rows_RD.dtype)


def sum_bags(rows_RD: Tensor, inverse_SK: Tensor) -> Tensor:
    """Sum as :func:`sum_rows` does, in one kernel that reads each row once: for devices where memory traffic decides.

    In place of a dropped choice, another row of the same source counts with weight zero, so that no other row's NaN
    gets into the sum.
    """
    dropped_SK, another_S = inverse_SK < 0, inverse_SK.amax(1)
    row_SK = torch.where(dropped_SK, another_S.clamp(min=0)[:, None], inverse_SK)
    counts_SK = (~dropped_SK).to(rows_RD.dtype)
    y_SD = F.embedding_bag(row_SK, rows_RD, mode="sum", per_sample_weights=counts_SK)
    return y_SD.masked_fill_((another_S < 0)[:, None], 0)


def _combine(rows_RD: Tensor, order: ExpertOrder) -> Tensor:
    """Sum the rows of each source row. A row past the end of ``rows_RD`` counts as dropped."""
    num_rows, inverse_SK = rows_RD.shape[0], order.inverse_SK
    if num_rows < inverse_SK.numel():
        inverse_SK = inverse_SK.masked_fill(inverse_SK >= num_rows, -1)
    # not from the offsets: a padded order has rows that no choice fills, and may have as many rows as choices
    all_kept = readable(inverse_SK) and inverse_SK.numel() > 0 and int(inverse_SK.amin()) >= 0
    return sum_rows(rows_RD, inverse_SK, all_kept=all_kept)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, num_rows: int, *order: Tensor) -> Tensor:
        ctx.save_for_backward(*order)
        return result(_permute(x_SD, ExpertOrder(*order), num_rows))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_RD: Tensor) -> tuple[Tensor | None, ...]:
        order = ExpertOrder(*ctx.saved_tensors)
        return _combine(drows_RD.contiguous(), order), None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, *order: Tensor) -> Tensor:
        ctx.save_for_backward(*order)
        ctx.num_rows = rows_RD.shape[0]
        return result(_combine(rows_RD.contiguous(), ExpertOrder(*order)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_SD: Tensor) -> tuple[Tensor | None, ...]:
        order = ExpertOrder(*ctx.saved_tensors)
        return _permute(dy_SD, order, ctx.num_rows), None, None, None


def permute(x_SD: Tensor, order: ExpertOrder, num_rows: int) -> Tensor:
    return _Permute.apply(x_SD, num_rows, *order)


def combine(rows_RD: Tensor, order: ExpertOrder) -> Tensor:
    return _Combine.apply(rows_RD, *order)
