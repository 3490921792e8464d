"""Expert by expert over the sorted rows, for the CPU.

What it is built around: matrix products run near the machine's peak whatever their layout, so the time beyond them
is memory and waiting. Rows are gathered, and the activation is computed, in scratch that stays in cache from one
expert to the next; products write where their result belongs; threads work on different experts; the backward pass
keeps the pre-activation and nothing else, or not even that.
"""

# S source rows, K choices per row, D hidden, F expert width, U width of the pre-activation (2F or F), E experts,
# R sorted rows (P: padded), N rows of an expert.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..memory import empty
from ..permute.torch_ops import sum_rows
from ..sort_by_expert import ExpertOrder
from .activation import Activation
from .kind import Kind
from .workers import each

#: multiply-adds of a forward pass from which threads work on different experts. OpenMP's own threads keep a core busy
#: for some milliseconds after what ran before, which a small layer would wait for.
_WORTH_WORKERS = 2 << 30


class _Span(NamedTuple):
    """One expert's rows: ``start:stop`` in sorted order, ``place:end`` in padded buffers."""

    expert: int
    start: int
    stop: int
    place: int
    end: int


class _Rows:
    """Where each expert's rows stand.

    oneDNN, which multiplies 16-bit matrices, compiles code for every number of rows it meets and is slow where that
    is no multiple of 16. Its products get a few zero rows more, so buffers of all rows have room for these.
    """

    def __init__(self, x_SD: Tensor, weights_SK: Tensor, order: ExpertOrder) -> None:
        bounds = order.offsets_E.tolist()
        self.like, self.order = x_SD, order
        self.kept = bounds[-1]
        multiple = 16 if x_SD.element_size() == 2 else 1
        #: of the experts that have rows
        self.spans: list[_Span] = []
        self.shifts, place = [], 0
        for expert, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            end = place - (start - stop) // multiple * multiple
            self.shifts.append(place - start)
            if start < stop:
                self.spans.append(_Span(expert, start, stop, place, end))
            place = end
        self.padded = place
        flat_R = order.order_R[: self.kept]
        self.source = self._split(flat_R // max(weights_SK.shape[1], 1))
        self.weights = self._split(weights_SK.reshape(-1)[flat_R, None])

    def _split(self, t: Tensor) -> dict[int, Tensor]:
        """The part of each expert that has rows, all made in one call."""
        parts = t.split_with_sizes([span.stop - span.start for span in self.spans])
        return {span.expert: part for span, part in zip(self.spans, parts, strict=True)}

    def buffer(self, width: int) -> Tensor:
        return empty(self.padded, width, like=self.like)

    def new_gradient(self, weight: Tensor) -> Tensor:
        """Room for the gradient of a stacked weight, zero for the experts without rows."""
        grad = empty(*weight.shape, like=weight)
        for expert in set(range(weight.shape[0])) - {span.expert for span in self.spans}:
            grad[expert].zero_()
        return grad

    def each(self, work: Callable[[Sequence[_Span]], None], widths: int) -> None:
        """``work`` on all experts; ``widths`` are of the weights' outputs, by which its cost is known."""
        if self.padded * self.like.shape[1] * widths >= _WORTH_WORKERS:
            each(self.spans, [span.end - span.place for span in self.spans], work)
        elif self.spans:
            work(self.spans)

    def gather(self, from_SD: Tensor, span: _Span, scratch: Tensor) -> Tensor:
        """The source rows of an expert, padded."""
        return pad(torch.index_select(from_SD, 0, self.source[span.expert], out=self.cut(scratch, span)), span)

    def cut(self, scratch: Tensor, span: _Span) -> Tensor:
        return scratch[: span.stop - span.start]

    def sum(self, rows_PD: Tensor) -> Tensor:
        """[S, D] the sum of each source row's rows."""
        inverse_SK, all_kept = self.order.inverse_SK, self.kept == self.order.order_R.numel()
        if self.padded > self.kept > 0:
            shift_R = inverse_SK.new_tensor(self.shifts).repeat_interleave(self.order.offsets_E.diff())
            place_R = shift_R.add_(torch.arange(self.kept, device=inverse_SK.device))
            inverse_SK = place_R[inverse_SK] if all_kept else torch.where(inverse_SK < 0, -1, place_R[inverse_SK])
        return sum_rows(rows_PD, inverse_SK, all_kept=all_kept)


def _scratch(spans: Sequence[_Span], like: Tensor, *widths: int) -> list[Tensor]:
    most = max(span.end - span.place for span in spans)
    return [empty(most, width, like=like) for width in widths]


def pad(rows_ND: Tensor, span: _Span) -> Tensor:
    """The same rows, which begin a scratch buffer, and the zero rows that belong after them."""
    size, total = span.stop - span.start, span.end - span.place
    if total == size:
        return rows_ND
    padded = rows_ND.as_strided((total, rows_ND.shape[1]), rows_ND.stride())
    padded[size:].zero_()
    return padded


def forward(
    x_SD: Tensor,
    weights_SK: Tensor,
    order: ExpertOrder,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    kind: Kind,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """The output [S, D] and, when asked to ``keep`` them, the pre-activations [P, U]."""
    rows = _Rows(x_SD, weights_SK, order)
    hidden, width, both = x_SD.shape[1], down_EDF.shape[2], gate_up_EFD.shape[1]
    pre_PU = rows.buffer(both) if keep else None
    out_PD = rows.buffer(hidden)
    up_EDU, down_EFD = gate_up_EFD.mT, down_EDF.mT

    def work(spans: Sequence[_Span]) -> None:
        activation = Activation(kind, max(span.end - span.place for span in spans), width, x_SD)
        x_scratch, pre_scratch = _scratch(spans, x_SD, hidden, 0 if keep else both)
        for span in spans:
            x_ND = rows.gather(x_SD, span, x_scratch)
            pre_NU = pre_scratch[: x_ND.shape[0]] if pre_PU is None else pre_PU[span.place : span.end]
            torch.mm(x_ND, up_EDU[span.expert], out=pre_NU)
            h_NF = activation.forward(rows.cut(pre_NU, span), rows.weights[span.expert])
            torch.mm(pad(h_NF, span), down_EFD[span.expert], out=out_PD[span.place : span.end])

    rows.each(work, both + width)
    return rows.sum(out_PD), pre_PU


def backward(
    dy_SD: Tensor,
    pre_PU: Tensor | None,
    x_SD: Tensor,
    weights_SK: Tensor,
    order: ExpertOrder,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    kind: Kind,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weights, gate_up and down; None where ``needs`` is False.

    A pre-activation that was not kept is computed again, expert by expert.
    """
    rows = _Rows(x_SD, weights_SK, order)
    hidden, width, both = x_SD.shape[1], down_EDF.shape[2], gate_up_EFD.shape[1]
    needs_x, needs_weights, needs_gate_up, needs_down = needs
    dx_PD = rows.buffer(hidden) if needs_x else None
    dweights_R = empty(rows.kept, like=weights_SK) if needs_weights else None
    dgate_up_EFD = rows.new_gradient(gate_up_EFD) if needs_gate_up else None
    ddown_EDF = rows.new_gradient(down_EDF) if needs_down else None

    def work(spans: Sequence[_Span]) -> None:
        activation = Activation(kind, max(span.end - span.place for span in spans), width, x_SD)
        row_scratch, dh_scratch, pre_scratch = _scratch(spans, x_SD, hidden, width, both if pre_PU is None else 0)
        for span in spans:
            if pre_PU is None:
                x_ND = rows.gather(x_SD, span, row_scratch)
                pre_NU = torch.mm(x_ND, gate_up_EFD[span.expert].t(), out=pre_scratch[: x_ND.shape[0]])
            else:
                pre_NU = pre_PU[span.place : span.end]
            dy_ND = rows.gather(dy_SD, span, row_scratch)
            dh_NF = torch.mm(dy_ND, down_EDF[span.expert], out=dh_scratch[: dy_ND.shape[0]])
            dw_N = None if dweights_R is None else dweights_R[span.start : span.stop]
            h_NF, dpre_NU = activation.backward(
                rows.cut(pre_NU, span), rows.weights[span.expert], rows.cut(dh_NF, span), dw_N
            )
            if ddown_EDF is not None:
                torch.mm(dy_ND.t(), pad(h_NF, span), out=ddown_EDF[span.expert])
            dpre_NU = pad(dpre_NU, span)
            if dgate_up_EFD is not None:
                torch.mm(dpre_NU.t(), rows.gather(x_SD, span, row_scratch), out=dgate_up_EFD[span.expert])
            if dx_PD is not None:
                torch.mm(dpre_NU, gate_up_EFD[span.expert], out=dx_PD[span.place : span.end])

    rows.each(work, both + width)
    dx_SD = None if dx_PD is None else rows.sum(dx_PD)
    dweights_SK = None if dweights_R is None else _unsort(dweights_R, order)
    return dx_SD, dweights_SK, dgate_up_EFD, ddown_EDF


def _unsort(values_R: Tensor, order: ExpertOrder) -> Tensor:
    """[S, K] one value per choice from one value per sorted row; zero where dropped."""
    out_SK = values_R.new_zeros(order.inverse_SK.shape)
    out_SK.view(-1)[order.order_R[: values_R.shape[0]]] = values_R
    return out_SK
