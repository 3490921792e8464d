"""The experts' MLPs as torch's grouped products, with Triton kernels for all that lies between them.

Needs bf16 and matrix widths of a multiple of 8. It differs from the torch backend by the kernels that move rows and
apply activations: each reads and writes every row once.
"""

# S source rows, K choices per row, D hidden, F expert width, U width of the pre-activation (2F or F), E experts,
# R routed rows.

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..activations.triton_ops import activate_rows, differentiate_rows
from ..empty_experts.triton_ops import zero_without_rows
from ..grouped_gemm.row_layouts import GroupedLayout
from ..permute.triton_ops import combine, permute
from ..sort_by_expert import ExpertOrder
from .types import MLPOptions


def forward(
    x_SD: Tensor,
    weights_SK: Tensor,
    order: ExpertOrder,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    options: MLPOptions,
    keep: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the output [S, D] and, if ``keep``, the pre-activations [R, U]."""
    num_rows = order.order_R.shape[0]
    if num_rows == 0 or down_EDF.numel() == 0:
        return x_SD.new_zeros(x_SD.shape), ()
    layout = GroupedLayout(order.offsets_E, num_rows)
    pre_RU = layout.product(permute(x_SD, order, num_rows), gate_up_EFD.mT)
    h_RF = activate_rows(pre_RU, weights_SK, order.order_R, *options)
    return combine(layout.product(h_RF, down_EDF.mT), order), (pre_RU,) if keep else ()


def backward(
    dy_SD: Tensor,
    kept: Sequence[Tensor],
    x_SD: Tensor,
    weights_SK: Tensor,
    order: ExpertOrder,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    options: MLPOptions,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weights, gate_up and down; None where ``needs`` is False.

    ``kept`` is what the forward kept. If that is nothing, recompute the pre-activations.
    """
    needs_x, needs_weights, needs_gate_up, needs_down = needs
    num_rows, inverse_SK = order.order_R.shape[0], order.inverse_SK
    if num_rows == 0 or down_EDF.numel() == 0:
        inputs = zip((x_SD, weights_SK, gate_up_EFD, down_EDF), needs, strict=True)
        dx, dweights, dgate_up, ddown = (t.new_zeros(t.shape) if needed else None for t, needed in inputs)
        return dx, dweights, dgate_up, ddown
    layout = GroupedLayout(order.offsets_E, num_rows)
    pre_RU = kept[0] if kept else layout.product(permute(x_SD, order, num_rows), gate_up_EFD.mT)
    dy_RD = permute(dy_SD, order, num_rows)
    dh_RF = layout.product(dy_RD, down_EDF)
    h_RF, dpre_RU, dweights_R = differentiate_rows(dh_RF, pre_RU, weights_SK, order.order_R, *options)
    del dh_RF, pre_RU
    dx_SD = dweights_SK = dgate_up_EFD = ddown_EDF = None
    if needs_weights:
        dweights_SK = dweights_R[inverse_SK.clamp(min=0)].masked_fill_(inverse_SK < 0, 0)
    if needs_down:
        ddown_EDF = _weight_grad(layout, dy_RD, h_RF)
    del dy_RD, h_RF
    if needs_gate_up:
        dgate_up_EFD = _weight_grad(layout, dpre_RU, permute(x_SD, order, num_rows))
    if needs_x:
        dx_SD = combine(layout.product(dpre_RU, gate_up_EFD), order)
    return dx_SD, dweights_SK, dgate_up_EFD, ddown_EDF


def _weight_grad(layout: GroupedLayout, left_RO: Tensor, right_RI: Tensor) -> Tensor:
    """[E, O, I] left.T @ right by expert; zero for experts without rows."""
    grad_EOI = layout.partial_weight_grad(left_RO, right_RI)
    zero_without_rows(grad_EOI, layout.offsets_E)
    return grad_EOI
