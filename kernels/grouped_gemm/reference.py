"""The reference: one expert after the other, in fp64. Rows of no expert, and their indices, are never read."""

# R rows sorted by expert, E experts, K in width, N out width.

from __future__ import annotations

import torch
from torch import Tensor


def _spans(offsets_E: Tensor) -> list[tuple[int, int, int]]:
    bounds = offsets_E.tolist()
    return [(e, a, b) for e, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False))]


def _slice(rows: Tensor, index_R: Tensor | None, start: int, stop: int) -> Tensor:
    """Return sorted rows start:stop, gathered if there is an index."""
    return rows[start:stop] if index_R is None else rows[index_R[start:stop]]


def forward(rows: Tensor, weight_ENK: Tensor, offsets_E: Tensor, index_R: Tensor | None) -> Tensor:
    num_rows = (rows if index_R is None else index_R).shape[0]
    out_RN = torch.zeros(num_rows, weight_ENK.shape[1], dtype=torch.float64, device=rows.device)
    for e, a, b in _spans(offsets_E):
        out_RN[a:b] = _slice(rows, index_R, a, b).double() @ weight_ENK[e].double().T
    return out_RN.to(rows.dtype)


def dgrad(dy_RN: Tensor, weight_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    return forward(dy_RN, weight_ENK.mT, offsets_E, None)


def wgrad(
    dy: Tensor, rows: Tensor, offsets_E: Tensor, dy_index_R: Tensor | None, index_R: Tensor | None, out: Tensor | None
) -> Tensor:
    spans = _spans(offsets_E)
    grad_ENK = torch.zeros(len(spans), dy.shape[1], rows.shape[1], dtype=torch.float64, device=dy.device)
    for e, a, b in spans:
        grad_ENK[e] = _slice(dy, dy_index_R, a, b).double().T @ _slice(rows, index_R, a, b).double()
    return grad_ENK.to(dy.dtype) if out is None else out.copy_(out.double() + grad_ENK)
