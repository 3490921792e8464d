"""Grouped products of all experts at once, without host synchronisation, for accelerators."""

# R rows sorted by expert, E experts, P places of a row layout, K in width, N out width.

from __future__ import annotations

import torch
from torch import Tensor

from .row_layouts import row_layout


def _rows_at(rows: Tensor, index_R: Tensor | None, row_P: Tensor) -> Tensor:
    """[P, ...] the sorted row (gathered, if there is an index) at each place; contiguous."""
    return rows[row_P if index_R is None else index_R[row_P]]


def forward(rows: Tensor, weight_ENK: Tensor, offsets_E: Tensor, index_R: Tensor | None) -> Tensor:
    """[R, N] rows @ weight[e].T; zero for rows past ``offsets[E]``."""
    num_rows, (experts, width_n, width_k) = (rows if index_R is None else index_R).shape[0], weight_ENK.shape
    if 0 in (num_rows, experts, width_n, width_k):
        return rows.new_zeros(num_rows, width_n)
    layout = row_layout(offsets_E, num_rows, rows.dtype, width_n, width_k)
    row_R = torch.arange(num_rows, device=rows.device)
    out_PN = layout.product(_rows_at(rows, index_R, layout.to_places(row_R)), weight_ENK.mT)
    return out_PN[layout.places_of(row_R)].masked_fill_((row_R >= layout.offsets_E[-1])[:, None], 0)


def wgrad(
    dy: Tensor, rows: Tensor, offsets_E: Tensor, dy_index_R: Tensor | None, index_R: Tensor | None, out: Tensor | None
) -> Tensor:
    """[E, N, K] dy.T @ rows by expert; added to ``out``, in its dtype, if it is given."""
    experts, num_rows = offsets_E.shape[0] - 1, (rows if index_R is None else index_R).shape[0]
    shape = (experts, dy.shape[1], rows.shape[1])
    if 0 in (num_rows, *shape):
        return dy.new_zeros(shape) if out is None else out
    dtype = dy.dtype if out is None else out.dtype
    layout = row_layout(offsets_E, num_rows, dtype, *shape[1:])
    row_P = layout.to_places(torch.arange(num_rows, device=rows.device))
    left_PN, right_PK = (_rows_at(t, i, row_P).to(dtype) for t, i in ((dy, dy_index_R), (rows, index_R)))
    grad_ENK = layout.weight_grad(left_PN, right_PK)
    return grad_ENK if out is None else out.add_(grad_ENK)
