"""The reference: plain indexing, differentiated by autograd. The contents of dropped rows are never read."""

# S source rows, K choices per row, D hidden, R = S*K routed rows.

from __future__ import annotations

import torch
from torch import Tensor

from ..sort_by_expert import ExpertOrder


def permute(x_SD: Tensor, order: ExpertOrder, num_rows: int) -> Tensor:
    choices = max(order.inverse_SK.shape[1], 1)
    kept = min(int(order.offsets_E[-1]), num_rows)
    rows_RD = x_SD[order.order_R[:kept] // choices]
    return torch.cat((rows_RD, x_SD.new_zeros(num_rows - kept, x_SD.shape[1])))


def combine(rows_RD: Tensor, order: ExpertOrder) -> Tensor:
    wide = rows_RD.double() if rows_RD.dtype == torch.float64 else rows_RD.float()
    sources, choices = order.inverse_SK.shape
    row_R = order.inverse_SK.reshape(-1)
    kept = ((row_R >= 0) & (row_R < rows_RD.shape[0])).nonzero().squeeze(1)
    y_SD = wide.new_zeros(sources, rows_RD.shape[1]).index_add(0, kept // max(choices, 1), wide[row_R[kept]])
    return y_SD.to(rows_RD.dtype)
