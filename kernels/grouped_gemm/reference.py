"""The oracle: one expert after the other, in fp64."""

# R rows sorted by expert, E experts, K in width, N out width.

from __future__ import annotations

import torch
from torch import Tensor


def _spans(offsets_E: Tensor) -> list[tuple[int, int, int]]:
    bounds = offsets_E.tolist()
    return [(e, a, b) for e, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False))]


def forward(rows: Tensor, weight_ENK: Tensor, offsets_E: Tensor, index_R: Tensor | None) -> Tensor:
    rows_RK = rows if index_R is None else rows[index_R]
    out_RN = torch.zeros(rows_RK.shape[0], weight_ENK.shape[1], dtype=torch.float64, device=rows.device)
    for e, a, b in _spans(offsets_E):
        out_RN[a:b] = rows_RK[a:b].double() @ weight_ENK[e].double().T
    return out_RN.to(rows.dtype)


def dgrad(dy_RN: Tensor, weight_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    return forward(dy_RN, weight_ENK.mT, offsets_E, None)


def wgrad(
    dy: Tensor, rows: Tensor, offsets_E: Tensor, dy_index_R: Tensor | None, index_R: Tensor | None, out: Tensor | None
) -> Tensor:
    dy_RN = dy if dy_index_R is None else dy[dy_index_R]
    rows_RK = rows if index_R is None else rows[index_R]
    spans = _spans(offsets_E)
    grad_ENK = torch.zeros(len(spans), dy.shape[1], rows.shape[1], dtype=torch.float64, device=dy.device)
    for e, a, b in spans:
        grad_ENK[e] = dy_RN[a:b].double().T @ rows_RK[a:b].double()
    return grad_ENK.to(dy.dtype) if out is None else out.copy_(out.double() + grad_ENK)
