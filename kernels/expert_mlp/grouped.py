"""Every expert at once and no host synchronisation, for accelerators.

Two layouts of the routed rows behind one contract. ``_Grouped`` is ``torch``'s grouped product, for bf16 rows of a
multiple of 16 bytes. ``_Blocks`` serves every other dtype and width: it pads each expert to whole blocks of about
R/E rows, so that there are at most 2E+1 blocks whatever the routing, and multiplies them as one batch.
"""

# S source rows, K choices per row, D hidden, F expert width, E experts, R routed rows, P rows of a layout,
# B blocks, N rows of one block; I and O the in and out width of a product.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..permute.torch_ops import sum_rows
from ..sort_by_expert import ExpertOrder


class _Grouped:
    """Rows in expert order; what lies past the kept rows is undefined and never read."""

    def __init__(self, order: ExpertOrder) -> None:
        choices = max(order.inverse_SK.shape[1], 1)
        self.flat_P = order.order_R
        self.source_P = order.order_R // choices
        self.inverse_SK = order.inverse_SK
        self.ends_E = order.offsets_E[1:].to(torch.int32)

    def product(self, rows_PI: Tensor, weight_EIO: Tensor) -> Tensor:
        return F.grouped_mm(rows_PI, weight_EIO, offs=self.ends_E)

    def weight_grad(self, left_PO: Tensor, right_PI: Tensor) -> Tensor:
        return F.grouped_mm(left_PO.t(), right_PI, offs=self.ends_E)


class _Blocks:
    """Rows in blocks of one expert each; empty places repeat some row and are cut off the weight gradients.

    A NaN in one expert's weight gradient reaches the others', which are added up in one product.
    """

    def __init__(self, order: ExpertOrder) -> None:
        rows, choices = order.order_R.numel(), max(order.inverse_SK.shape[1], 1)
        offsets_E, device = order.offsets_E, order.order_R.device
        self.experts = offsets_E.numel() - 1
        self.size = -(-rows // (16 * self.experts)) * 16
        num_blocks = -(-rows // self.size) + self.experts
        counts_E = offsets_E.diff()
        blocks_E = (counts_E + self.size - 1) // self.size
        ends_E = blocks_E.cumsum(0)
        first_E = (ends_E - blocks_E) * self.size
        expert_B = torch.searchsorted(ends_E, torch.arange(num_blocks, device=device), right=True)
        self.expert_B = expert_B.clamp_(max=self.experts - 1)
        expert_P = self.expert_B.repeat_interleave(self.size)
        rank_P = torch.arange(num_blocks * self.size, device=device) - first_E[expert_P]
        self.filled_P = rank_P < counts_E[expert_P]
        row_P = (rank_P + offsets_E[expert_P]).clamp_(max=rows - 1)
        self.flat_P = order.order_R[row_P]
        self.source_P = self.flat_P // choices
        expert_R = torch.searchsorted(offsets_E, torch.arange(rows, device=device), right=True) - 1
        expert_R = expert_R.clamp_(max=self.experts - 1)
        place_R = torch.arange(rows, device=device) - offsets_E[expert_R] + first_E[expert_R]
        self.inverse_SK = torch.where(order.inverse_SK < 0, -1, place_R[order.inverse_SK.clamp(min=0)])

    def _batch(self, rows_PI: Tensor) -> Tensor:
        return rows_PI.view(-1, self.size, rows_PI.shape[1])

    def product(self, rows_PI: Tensor, weight_EIO: Tensor) -> Tensor:
        return torch.bmm(self._batch(rows_PI), weight_EIO[self.expert_B]).flatten(0, 1)

    def weight_grad(self, left_PO: Tensor, right_PI: Tensor) -> Tensor:
        left_PO, right_PI = (t.masked_fill(~self.filled_P[:, None], 0) for t in (left_PO, right_PI))
        wide = torch.float64 if left_PO.dtype == torch.float64 else torch.float32
        grad_BOI = torch.bmm(self._batch(left_PO).mT, self._batch(right_PI)).to(wide)
        member_EB = (self.expert_B == torch.arange(self.experts, device=left_PO.device)[:, None]).to(wide)
        return (member_EB @ grad_BOI.flatten(1)).view(-1, *grad_BOI.shape[1:]).to(left_PO.dtype)


def _layout(x_SD: Tensor, down_EDF: Tensor, order: ExpertOrder) -> _Grouped | _Blocks:
    aligned = x_SD.shape[1] % 8 == 0 and down_EDF.shape[2] % 8 == 0
    return _Grouped(order) if x_SD.dtype == torch.bfloat16 and aligned else _Blocks(order)


def forward(
    x_SD: Tensor, weights_SK: Tensor, order: ExpertOrder, gate_up_EFD: Tensor, down_EDF: Tensor, keep: bool = True
) -> tuple[Tensor, Tensor]:
    """The output [S, D] and the pre-activations [P, 2F]."""
    if order.order_R.numel() == 0:
        return torch.zeros_like(x_SD), x_SD.new_zeros(0, 2 * down_EDF.shape[2])
    rows = _layout(x_SD, down_EDF, order)
    pre_PF = rows.product(x_SD[rows.source_P], gate_up_EFD.contiguous().mT)
    gate_PF, up_PF = pre_PF.chunk(2, 1)
    out_PD = rows.product(F.silu(gate_PF).mul_(up_PF), down_EDF.contiguous().mT)
    out_PD.mul_(weights_SK.reshape(-1)[rows.flat_P, None])
    return sum_rows(out_PD, rows.inverse_SK), pre_PF


def backward(
    dy_SD: Tensor,
    pre_PF: Tensor,
    x_SD: Tensor,
    weights_SK: Tensor,
    order: ExpertOrder,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weights, gate_up and down; None where ``needs`` is False."""
    needs_x, needs_weights, needs_gate_up, needs_down = needs
    if order.order_R.numel() == 0:
        inputs = (x_SD, weights_SK, gate_up_EFD, down_EDF)
        dx, dweights, dgate_up, ddown = (torch.zeros_like(t) if n else None for t, n in zip(inputs, needs, strict=True))
        return dx, dweights, dgate_up, ddown
    rows = _layout(x_SD, down_EDF, order)
    empty_E = (order.offsets_E.diff() == 0)[:, None, None]
    w_P1 = weights_SK.reshape(-1)[rows.flat_P, None]
    gate_PF, up_PF = pre_PF.chunk(2, 1)
    s_PF = F.silu(gate_PF)
    h_PF = s_PF * up_PF
    dy_PD = dy_SD[rows.source_P]
    dh_PF = rows.product(dy_PD, down_EDF.contiguous())
    dx_SD = dweights_SK = dgate_up_EFD = ddown_EDF = None
    if needs_weights:
        dweights_P = (dh_PF * h_PF).sum(1, dtype=weights_SK.dtype)
        dweights_SK = dweights_P[rows.inverse_SK.clamp(min=0)].masked_fill_(rows.inverse_SK < 0, 0)
    if needs_down:
        ddown_EDF = rows.weight_grad(dy_PD.mul_(w_P1), h_PF).masked_fill_(empty_E, 0)
    if needs_x or needs_gate_up:
        dh_PF.mul_(w_P1)
        dup_PF = dh_PF * s_PF
        dpre_PF = torch.cat([torch.ops.aten.silu_backward(dh_PF.mul_(up_PF), gate_PF), dup_PF], 1)
        if needs_gate_up:
            dgate_up_EFD = rows.weight_grad(dpre_PF, x_SD[rows.source_P]).masked_fill_(empty_E, 0)
        if needs_x:
            dx_SD = sum_rows(rows.product(dpre_PF, gate_up_EFD.contiguous()), rows.inverse_SK)
    return dx_SD, dweights_SK, dgate_up_EFD, ddown_EDF
