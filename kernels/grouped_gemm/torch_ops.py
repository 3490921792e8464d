"""On the CPU one product per expert, writing where its result belongs; elsewhere all at once, without waiting."""

# R rows sorted by expert, E experts, K in width, N out width.

from __future__ import annotations

import torch
from torch import Tensor

from ..values import has_values
from . import grouped


def on_host(t: Tensor) -> bool:
    """Whether the host has values to work with; a dry run on the CPU has none."""
    return t.device.type == "cpu" and has_values(t)


def _spans(offsets_E: Tensor) -> list[tuple[int, int, int]]:
    bounds = offsets_E.tolist()
    return [(e, a, b) for e, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)) if a < b]


def forward(rows: Tensor, weight_ENK: Tensor, offsets_E: Tensor, index_R: Tensor | None) -> Tensor:
    if not on_host(rows):
        return grouped.forward(rows, weight_ENK, offsets_E, index_R)
    num_rows = (rows if index_R is None else index_R).shape[0]
    out_RN = rows.new_zeros(num_rows, weight_ENK.shape[1])
    for e, a, b in _spans(offsets_E):
        rows_NK = rows[a:b] if index_R is None else rows.index_select(0, index_R[a:b])
        torch.mm(rows_NK, weight_ENK[e].T, out=out_RN[a:b])
    return out_RN


def dgrad(dy_RN: Tensor, weight_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    return forward(dy_RN, weight_ENK.mT, offsets_E, None)


def wgrad(
    dy: Tensor, rows: Tensor, offsets_E: Tensor, dy_index_R: Tensor | None, index_R: Tensor | None, out: Tensor | None
) -> Tensor:
    if not on_host(rows):
        return grouped.wgrad(dy, rows, offsets_E, dy_index_R, index_R, out)
    shape = (offsets_E.shape[0] - 1, dy.shape[1], rows.shape[1])
    grad_ENK = dy.new_zeros(shape) if out is None else out
    for e, a, b in _spans(offsets_E):
        left = dy[a:b] if dy_index_R is None else dy.index_select(0, dy_index_R[a:b])
        right = rows[a:b] if index_R is None else rows.index_select(0, index_R[a:b])
        if out is None:
            torch.mm(left.T, right, out=grad_ENK[e])
        else:
            grad_ENK[e].addmm_(left.T.to(out.dtype), right.to(out.dtype))
    return grad_ENK
