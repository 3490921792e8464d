"""On the CPU one product per expert, writing where its result belongs; elsewhere all at once, without waiting."""

# R rows sorted by expert, E experts, K in width, N out width.

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..values import has_values
from . import grouped


def on_host(t: Tensor) -> bool:
    """Whether the host has values to work with; a dry run on the CPU has none."""
    return t.is_cpu and has_values(t)


class _Spans:
    """The sorted rows of the experts that have any. Views are made of all of them at once: one call instead of many."""

    def __init__(self, offsets_E: Tensor, num_rows: int) -> None:
        bounds = offsets_E.tolist()
        spans = [(e, b - a) for e, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)) if a < b]
        self.experts, sizes = [e for e, _ in spans], [size for _, size in spans]
        self.rest = num_rows - sum(sizes)
        self.sizes = [*sizes, self.rest]

    def split(self, t: Tensor) -> tuple[Tensor, ...]:
        """A part for each of the experts; the last one is of nobody's rows."""
        return t.split_with_sizes(self.sizes)

    def gather(self, rows: Tensor, index_R: Tensor | None) -> Iterator[Tensor]:
        """The (gathered) rows of each of the experts, one after the other."""
        if index_R is None:
            return iter(self.split(rows)[:-1])
        return (rows.index_select(0, index_N) for index_N in self.split(index_R)[:-1])


def forward(rows: Tensor, weight_ENK: Tensor, offsets_E: Tensor, index_R: Tensor | None) -> Tensor:
    if not on_host(rows):
        return grouped.forward(rows, weight_ENK, offsets_E, index_R)
    num_rows = (rows if index_R is None else index_R).shape[0]
    spans, weight_EKN = _Spans(offsets_E, num_rows), weight_ENK.mT
    out_RN = rows.new_empty(num_rows, weight_EKN.shape[2])
    *outs, rest_RN = spans.split(out_RN)
    for e, rows_NK, out_NN in zip(spans.experts, spans.gather(rows, index_R), outs, strict=True):
        torch.mm(rows_NK, weight_EKN[e], out=out_NN)
    if spans.rest:
        rest_RN.zero_()
    return out_RN


def dgrad(dy_RN: Tensor, weight_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    return forward(dy_RN, weight_ENK.mT, offsets_E, None)


def wgrad(
    dy: Tensor, rows: Tensor, offsets_E: Tensor, dy_index_R: Tensor | None, index_R: Tensor | None, out: Tensor | None
) -> Tensor:
    if not on_host(rows):
        return grouped.wgrad(dy, rows, offsets_E, dy_index_R, index_R, out)
    spans = _Spans(offsets_E, (rows if index_R is None else index_R).shape[0])
    grad_ENK = dy.new_zeros(offsets_E.shape[0] - 1, dy.shape[1], rows.shape[1]) if out is None else out
    for e, left, right in zip(spans.experts, spans.gather(dy, dy_index_R), spans.gather(rows, index_R), strict=True):
        if out is None:
            torch.mm(left.mT, right, out=grad_ENK[e])
        else:
            grad_ENK[e].addmm_(left.mT.to(out.dtype), right.to(out.dtype))
    return grad_ENK
