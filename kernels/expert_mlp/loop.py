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

_silu = torch.ops.aten.silu.out
_silu_backward = torch.ops.aten.silu_backward.grad_input


def _spans(order: ExpertOrder) -> list[tuple[int, int, int]]:
    """(expert, first row, row after the last) of every expert."""
    bounds = order.offsets_E.tolist()
    return [(expert, bounds[expert], bounds[expert + 1]) for expert in range(len(bounds) - 1)]


class _Scratch:
    """Buffers for the rows of one expert, reused for every expert."""

    def __init__(self, spans: list[tuple[int, int, int]], like: Tensor) -> None:
        self.rows = max(stop - start for _, start, stop in spans)
        self.like = like

    def new(self, width: int) -> Tensor:
        return empty(self.rows, width, like=self.like)


def forward(
    x_SD: Tensor, weights_SK: Tensor, order: ExpertOrder, gate_up_EFD: Tensor, down_EDF: Tensor
) -> tuple[Tensor, Tensor]:
    """The output [S, D] and the pre-activations [R, 2F]."""
    spans = _spans(order)
    kept, width = spans[-1][2], down_EDF.shape[2]
    flat_R = order.order_R[:kept]
    source_R = flat_R // weights_SK.shape[1] if kept else flat_R
    weights_R = weights_SK.reshape(-1)[flat_R, None]
    scratch = _Scratch(spans, x_SD)
    x_buffer, h_buffer = scratch.new(x_SD.shape[1]), scratch.new(width)
    pre_RF = empty(kept, 2 * width, like=x_SD)
    rows_RD = empty(kept, x_SD.shape[1], like=x_SD)
    for expert, start, stop in spans:
        if start == stop:
            continue
        x_ND = torch.index_select(x_SD, 0, source_R[start:stop], out=x_buffer[: stop - start])
        pre_NF = torch.mm(x_ND, gate_up_EFD[expert].t(), out=pre_RF[start:stop])
        h_NF = _silu(pre_NF[:, :width], out=h_buffer[: stop - start]).mul_(pre_NF[:, width:])
        torch.mm(h_NF, down_EDF[expert].t(), out=rows_RD[start:stop]).mul_(weights_R[start:stop])
    return sum_rows(rows_RD, order.inverse_SK, all_kept=kept == order.order_R.numel()), pre_RF


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
    spans = _spans(order)
    kept, hidden, width = spans[-1][2], x_SD.shape[1], down_EDF.shape[2]
    flat_R = order.order_R[:kept]
    source_R = flat_R // weights_SK.shape[1] if kept else flat_R
    weights_R = weights_SK.reshape(-1)[flat_R, None]
    needs_x, needs_weights, needs_gate_up, needs_down = needs
    dx_RD = empty(kept, hidden, like=x_SD) if needs_x else None
    dweights_R = empty(kept, like=weights_SK) if needs_weights else None
    dgate_up_EFD = empty(*gate_up_EFD.shape, like=gate_up_EFD) if needs_gate_up else None
    ddown_EDF = empty(*down_EDF.shape, like=down_EDF) if needs_down else None
    scratch = _Scratch(spans, x_SD)
    row_buffer, s_buffer, h_buffer, dh_buffer = map(scratch.new, (hidden, width, width, width))
    dpre_buffer = scratch.new(2 * width)
    for expert, start, stop in spans:
        size = stop - start
        if size == 0:
            for grad in (dgate_up_EFD, ddown_EDF):
                if grad is not None:
                    grad[expert].zero_()
            continue
        w_N1, source_N = weights_R[start:stop], source_R[start:stop]
        gate_NF, up_NF = pre_RF[start:stop].split(width, 1)
        s_NF = _silu(gate_NF, out=s_buffer[:size])
        h_NF = torch.mul(s_NF, up_NF, out=h_buffer[:size])
        dy_ND = torch.index_select(dy_SD, 0, source_N, out=row_buffer[:size])
        dh_NF = torch.mm(dy_ND, down_EDF[expert], out=dh_buffer[:size])
        if dweights_R is not None:
            product_NF = torch.mul(dh_NF, h_NF, out=dpre_buffer[:size, :width])
            torch.sum(product_NF, 1, dtype=dweights_R.dtype, out=dweights_R[start:stop])
        if ddown_EDF is not None:
            torch.mm(dy_ND.mul_(w_N1).t(), h_NF, out=ddown_EDF[expert])
        if dgate_up_EFD is None and dx_RD is None:
            continue
        dh_NF.mul_(w_N1)
        dpre_NF = dpre_buffer[:size]
        torch.mul(dh_NF, s_NF, out=dpre_NF[:, width:])
        _silu_backward(dh_NF.mul_(up_NF), gate_NF, grad_input=dpre_NF[:, :width])
        if dgate_up_EFD is not None:
            x_ND = torch.index_select(x_SD, 0, source_N, out=row_buffer[:size])
            torch.mm(dpre_NF.t(), x_ND, out=dgate_up_EFD[expert])
        if dx_RD is not None:
            torch.mm(dpre_NF, gate_up_EFD[expert], out=dx_RD[start:stop])
    all_kept = kept == order.order_R.numel()
    dx_SD = None if dx_RD is None else sum_rows(dx_RD, order.inverse_SK, all_kept=all_kept)
    dweights_SK = None if dweights_R is None else _unsort(dweights_R, order)
    return dx_SD, dweights_SK, dgate_up_EFD, ddown_EDF


def _unsort(values_R: Tensor, order: ExpertOrder) -> Tensor:
    """[S, K] one value per choice from one value per sorted row; zero where dropped."""
    out_SK = values_R.new_zeros(order.inverse_SK.shape)
    out_SK.view(-1)[order.order_R[: values_R.shape[0]]] = values_R
    return out_SK
