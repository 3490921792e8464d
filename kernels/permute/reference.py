"""The oracle: plain indexing, differentiated by autograd."""

# S source rows, K choices per row, D hidden, R = S*K routed rows.

from __future__ import annotations

import torch
from torch import Tensor

from ..sort_by_expert import ExpertOrder


def permute(x_SD: Tensor, order: ExpertOrder, num_rows: int) -> Tensor:
    choices = order.inverse_SK.shape[1]
    kept = int(order.offsets_E[-1])
    rows = [x_SD[i // choices] if r < kept else 0 * x_SD[0] for r, i in enumerate(order.order_R[:num_rows].tolist())]
    return torch.stack(rows) if rows else x_SD[:0]


def combine(rows_RD: Tensor, order: ExpertOrder) -> Tensor:
    wide = rows_RD.double() if rows_RD.dtype == torch.float64 else rows_RD.float()
    sources, choices = order.inverse_SK.shape
    y_SD = wide.new_zeros(sources, rows_RD.shape[1])
    for k in range(choices):
        row_S = order.inverse_SK[:, k]
        kept = (row_S >= 0).nonzero().squeeze(1)
        y_SD = y_SD.index_add(0, kept, wide[row_S[kept]])
    return y_SD.to(rows_RD.dtype)
