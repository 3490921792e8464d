"""Grouped products on a CPU: one matrix product per expert, written directly to its place in the result."""

# R rows sorted by expert, E experts, K in width, N out width.

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor


def rows_of_experts(offsets: list[int]) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has rows, and the slice of the sorted rows that belongs to it."""
    for expert, (start, stop) in enumerate(pairwise(offsets)):
        if start < stop:
            yield expert, slice(start, stop)


def _gather(rows: Tensor, index_R: Tensor | None, span: slice) -> Tensor:
    return rows[span] if index_R is None else rows.index_select(0, index_R[span])


def forward(rows: Tensor, weight_ENK: Tensor, offsets_E: Tensor, index_R: Tensor | None) -> Tensor:
    """[R, N] rows @ weight[e].T; zero for rows past ``offsets[E]``."""
    num_rows = (rows if index_R is None else index_R).shape[0]
    out_RN = rows.new_empty(num_rows, weight_ENK.shape[1])
    for expert, span in rows_of_experts(offsets_E.tolist()):
        torch.mm(_gather(rows, index_R, span), weight_ENK[expert].T, out=out_RN[span])
    out_RN[int(offsets_E[-1]) :] = 0
    return out_RN


def wgrad(
    dy: Tensor, rows: Tensor, offsets_E: Tensor, dy_index_R: Tensor | None, index_R: Tensor | None, out: Tensor | None
) -> Tensor:
    """[E, N, K] dy.T @ rows by expert; added to ``out``, in its dtype, if it is given."""
    grad_ENK = dy.new_zeros(offsets_E.shape[0] - 1, dy.shape[1], rows.shape[1]) if out is None else out
    for expert, span in rows_of_experts(offsets_E.tolist()):
        left, right = _gather(dy, dy_index_R, span), _gather(rows, index_R, span)
        if out is None:
            torch.mm(left.T, right, out=grad_ENK[expert])
        else:
            grad_ENK[expert].addmm_(left.T.to(out.dtype), right.to(out.dtype))
    return grad_ENK
