"""Expert by expert over the sorted rows, for the CPU.

What it is built around: matrix products run near the machine's peak whatever their layout, so the time beyond them
is memory. Rows are gathered, and the activation is computed, in scratch that stays in cache from one expert to the
next; products write where their result belongs; the backward pass keeps the pre-activation and nothing else.
"""

# S source rows, K choices per row, D hidden, F expert width, E experts, R kept routed rows, N rows of one expert.

from __future__ import annotations

import torch
from torch import Tensor

from ..memory import empty
from ..permute.torch_ops import sum_rows
from ..sort_by_expert import ExpertOrder
from .swiglu import SwiGLU


class _Rows:
    """Where each expert's rows stand, and buffers for the rows of one expert that serve all.

    oneDNN, which multiplies 16-bit matrices, compiles code for every number of rows it meets and is slow where that
    is no multiple of 16. Its products therefore get a few zero rows more; what they write past an expert's rows is
    overwritten by the next expert.
    """

    def __init__(self, x_SD: Tensor, weights_SK: Tensor, order: ExpertOrder) -> None:
        bounds = order.offsets_E.tolist()
        self.like = x_SD
        self.kept = bounds[-1]
        self.all_kept = self.kept == order.order_R.numel()
        self.multiple = 16 if x_SD.element_size() == 2 else 1
        #: (expert, first row, row after the last), of experts that have rows
        self.spans = [(e, a, b) for e, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)) if a < b]
        self.idle = [e for e, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)) if a == b]
        self.most = max((self.padded(b - a) for _, a, b in self.spans), default=0)
        flat_R = order.order_R[: self.kept]
        self.source_R = flat_R // max(weights_SK.shape[1], 1)
        self.weights_R1 = weights_SK.reshape(-1)[flat_R, None]

    def padded(self, size: int) -> int:
        return -(-size // self.multiple) * self.multiple

    def scratch(self, width: int) -> Tensor:
        return empty(self.most, width, like=self.like)

    def result(self, width: int) -> Tensor:
        """A buffer for all kept rows, with room for what the last product writes past them."""
        return empty(self.kept + self.multiple - 1, width, like=self.like)

    def gather(self, from_SD: Tensor, start: int, stop: int, buffer: Tensor) -> Tensor:
        """The source rows of an expert, zero rows added."""
        size = stop - start
        torch.index_select(from_SD, 0, self.source_R[start:stop], out=buffer[:size])
        return self.pad(buffer[:size])

    def pad(self, rows_N: Tensor) -> Tensor:
        """The same rows, which begin a scratch buffer, and zero rows after them."""
        size, width = rows_N.shape
        total = self.padded(size)
        if total == size:
            return rows_N
        padded = rows_N.as_strided((total, width), rows_N.stride())
        padded[size:].zero_()
        return padded


def forward(
    x_SD: Tensor, weights_SK: Tensor, order: ExpertOrder, gate_up_EFD: Tensor, down_EDF: Tensor, keep: bool = True
) -> tuple[Tensor, Tensor]:
    """The output [S, D] and, when asked to ``keep`` them, the pre-activations [R, 2F]."""
    rows = _Rows(x_SD, weights_SK, order)
    hidden, width = x_SD.shape[1], down_EDF.shape[2]
    swiglu = SwiGLU(rows.most, width, x_SD)
    x_buffer = rows.scratch(hidden)
    pre_RF = rows.result(2 * width) if keep else rows.scratch(2 * width)
    out_RD = rows.result(hidden)
    for expert, start, stop in rows.spans:
        x_ND = rows.gather(x_SD, start, stop, x_buffer)
        stop_padded = start + x_ND.shape[0]
        pre_NF = pre_RF[start:stop_padded] if keep else pre_RF[: x_ND.shape[0]]
        torch.mm(x_ND, gate_up_EFD[expert].t(), out=pre_NF)
        h_NF = swiglu.forward(pre_NF[: stop - start], rows.weights_R1[start:stop])
        torch.mm(rows.pad(h_NF), down_EDF[expert].t(), out=out_RD[start:stop_padded])
    return sum_rows(out_RD, order.inverse_SK, all_kept=rows.all_kept), pre_RF


def backward(
    dy_SD: Tensor,
    pre_RF: Tensor,
    x_SD: Tensor,
    weights_SK: Tensor,
    order: ExpertOrder,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weights, gate_up and down; None where ``needs`` is False."""
    rows = _Rows(x_SD, weights_SK, order)
    hidden, width = x_SD.shape[1], down_EDF.shape[2]
    needs_x, needs_weights, needs_gate_up, needs_down = needs
    dx_RD = rows.result(hidden) if needs_x else None
    dweights_R = empty(rows.kept, like=weights_SK) if needs_weights else None
    dgate_up_EFD = _new_gradient(gate_up_EFD, rows.idle) if needs_gate_up else None
    ddown_EDF = _new_gradient(down_EDF, rows.idle) if needs_down else None
    swiglu = SwiGLU(rows.most, width, x_SD)
    row_buffer, dh_buffer = rows.scratch(hidden), rows.scratch(width)
    for expert, start, stop in rows.spans:
        size, w_N1 = stop - start, rows.weights_R1[start:stop]
        dy_ND = rows.gather(dy_SD, start, stop, row_buffer)
        dh_NF = torch.mm(dy_ND, down_EDF[expert], out=dh_buffer[: dy_ND.shape[0]])
        dw_N = None if dweights_R is None else dweights_R[start:stop]
        h_NF, dpre_NF = swiglu.backward(pre_RF[start:stop], w_N1, dh_NF[:size], dw_N)
        if ddown_EDF is not None:
            torch.mm(dy_ND.t(), rows.pad(h_NF), out=ddown_EDF[expert])
        dpre_NF = rows.pad(dpre_NF)
        if dgate_up_EFD is not None:
            x_ND = rows.gather(x_SD, start, stop, row_buffer)
            torch.mm(dpre_NF.t(), x_ND, out=dgate_up_EFD[expert])
        if dx_RD is not None:
            torch.mm(dpre_NF, gate_up_EFD[expert], out=dx_RD[start : start + dpre_NF.shape[0]])
    dx_SD = None if dx_RD is None else sum_rows(dx_RD, order.inverse_SK, all_kept=rows.all_kept)
    dweights_SK = None if dweights_R is None else _unsort(dweights_R, order)
    return dx_SD, dweights_SK, dgate_up_EFD, ddown_EDF


def _new_gradient(weight: Tensor, idle: list[int]) -> Tensor:
    """Room for the gradient of a stacked weight, zero for the experts without rows."""
    grad = empty(*weight.shape, like=weight)
    for expert in idle:
        grad[expert].zero_()
    return grad


def _unsort(values_R: Tensor, order: ExpertOrder) -> Tensor:
    """[S, K] one value per choice from one value per sorted row; zero where dropped."""
    out_SK = values_R.new_zeros(order.inverse_SK.shape)
    out_SK.view(-1)[order.order_R[: values_R.shape[0]]] = values_R
    return out_SK
