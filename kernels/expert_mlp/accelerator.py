"""The experts' MLPs, all experts at once and without host synchronisation, for accelerators."""

# S source rows, K choices per row, D hidden, F expert width, U width of the pre-activation (2F or F), E experts,
# R routed rows, P places of a row layout.

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..grouped_gemm.row_layouts import row_layout
from ..permute.torch_ops import sum_rows
from ..sort_by_expert import ExpertOrder
from .types import MLPOptions


class _Rows:
    """A layout of the routed rows, and their source rows and weights."""

    def __init__(self, weights_SK: Tensor, order: ExpertOrder, down_EDF: Tensor) -> None:
        self.layout = row_layout(order.offsets_E, order.order_R.numel(), down_EDF.dtype, *down_EDF.shape[1:])
        flat_P = self.layout.to_places(order.order_R)
        self.source_P = flat_P // max(weights_SK.shape[1], 1)
        self.weights_P1 = weights_SK.reshape(-1)[flat_P, None]
        self.inverse_SK = self.layout.places_of(order.inverse_SK)


def _is_empty(order: ExpertOrder, down_EDF: Tensor) -> bool:
    """Tell whether there is nothing to multiply."""
    return order.order_R.shape[0] == 0 or down_EDF.numel() == 0


def _activate(pre_PU: Tensor, options: MLPOptions, width: int) -> tuple[Tensor, Tensor]:
    """Return act(z) and the input of the down projection, [P, F] each."""
    s_PF = ACTIVATIONS[options.activation].value(pre_PU[:, :width], out=pre_PU.new_empty(pre_PU.shape[0], width))
    return s_PF, s_PF * pre_PU[:, width:] if options.gated else s_PF


def _differentiate(dh_PF: Tensor, s_PF: Tensor, pre_PU: Tensor, options: MLPOptions) -> Tensor:
    """Return the gradient of the pre-activation, [P, U]. Overwrites ``dh_PF``."""
    width, gradient = dh_PF.shape[1], ACTIVATIONS[options.activation].gradient
    z_PF, up_PF = pre_PU[:, :width], pre_PU[:, width:]
    if torch.compiler.is_compiling():  # dynamo refuses a strided ``out``; the compiler needs none to avoid copies
        if not options.gated:
            return gradient(dh_PF, z_PF, out=torch.empty_like(dh_PF))
        return torch.cat((gradient(dh_PF * up_PF, z_PF, out=torch.empty_like(dh_PF)), dh_PF * s_PF), 1)
    dpre_PU = torch.empty_like(pre_PU)
    if options.gated:
        torch.mul(dh_PF, s_PF, out=dpre_PU[:, width:])
        dh_PF.mul_(up_PF)
    gradient(dh_PF, z_PF, out=dpre_PU[:, :width])
    return dpre_PU


def forward(
    x_SD: Tensor,
    weights_SK: Tensor,
    order: ExpertOrder,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    options: MLPOptions,
    keep: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the output [S, D] and, if ``keep``, the pre-activations [P, U]."""
    if _is_empty(order, down_EDF):
        return x_SD.new_zeros(x_SD.shape), ()
    rows = _Rows(weights_SK, order, down_EDF)
    pre_PU = rows.layout.product(x_SD[rows.source_P], gate_up_EFD.mT)
    h_PF = _activate(pre_PU, options, down_EDF.shape[2])[1]
    out_PD = rows.layout.product(h_PF, down_EDF.mT).mul_(rows.weights_P1)
    return sum_rows(out_PD, rows.inverse_SK), (pre_PU,) if keep else ()


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
    if _is_empty(order, down_EDF):
        inputs = zip((x_SD, weights_SK, gate_up_EFD, down_EDF), needs, strict=True)
        dx, dweights, dgate_up, ddown = (t.new_zeros(t.shape) if needed else None for t, needed in inputs)
        return dx, dweights, dgate_up, ddown
    rows = _Rows(weights_SK, order, down_EDF)
    product, weight_grad = rows.layout.product, rows.layout.weight_grad
    pre_PU = kept[0] if kept else product(x_SD[rows.source_P], gate_up_EFD.mT)
    s_PF, h_PF = _activate(pre_PU, options, down_EDF.shape[2])
    dy_PD = dy_SD[rows.source_P]
    dh_PF = product(dy_PD, down_EDF)
    dx_SD = dweights_SK = dgate_up_EFD = ddown_EDF = None
    if needs_weights:
        dweights_P = (dh_PF * h_PF).sum(1, dtype=weights_SK.dtype)
        dweights_SK = dweights_P[rows.inverse_SK.clamp(min=0)].masked_fill_(rows.inverse_SK < 0, 0)
    if needs_down:
        ddown_EDF = weight_grad(dy_PD.mul_(rows.weights_P1), h_PF)
    if needs_x or needs_gate_up:
        dpre_PU = _differentiate(dh_PF.mul_(rows.weights_P1), s_PF, pre_PU, options)
        if needs_gate_up:
            dgate_up_EFD = weight_grad(dpre_PU, x_SD[rows.source_P])
        if needs_x:
            dx_SD = sum_rows(product(dpre_PU, gate_up_EFD), rows.inverse_SK)
    return dx_SD, dweights_SK, dgate_up_EFD, ddown_EDF
