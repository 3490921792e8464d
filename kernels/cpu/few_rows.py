"""The experts' MLPs on a CPU for few rows: all experts at once, because calls of torch would take most of the time.

The products are torch's grouped ones, which multiply expert by expert as well, so the numbers are those of
:mod:`.expert_mlp`; only sums over more than four choices may be rounded in another order.
"""

# S source rows, K choices per row, D hidden, F expert width, U width of the pre-activation (2F or F), E experts,
# P places.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grouped_gemm.row_layouts import grouped_mm
from ..sort_by_expert import ExpertOrder
from .expert_mlp import Rows, activate, differentiate, widen
from .memory import HUGE_PAGE

if TYPE_CHECKING:
    from ..expert_mlp.types import MLPOptions


#: up to this many elements of the pre-activation; benchmarks/NOTES.md has the measurements
_FEW = 1 << 17


def fits(rows: int, gate_up_EUD: Tensor, down_EDF: Tensor) -> bool:
    """Tell whether there are few rows, torch's grouped product takes the weights, and they need no huge pages."""
    size, (experts, both, hidden) = gate_up_EUD.element_size(), gate_up_EUD.shape
    if rows * both > _FEW or experts * both * hidden * size >= HUGE_PAGE or gate_up_EUD.dtype == torch.float64:
        return False
    return all(width and width * size % 16 == 0 for width in (hidden, both, down_EDF.shape[2]))


def _sum(rows: Rows, rows_PD: Tensor) -> Tensor:
    """[S, D] the sum over each source row's kept rows."""
    if rows.all_kept and rows_PD.dtype == torch.float32:  # fewer calls
        return rows_PD[rows.inverse_SK].sum(1)
    return rows.sum(rows_PD)


def forward(
    x_SD: Tensor,
    weights_SK: Tensor,
    order: ExpertOrder,
    gate_up_EUD: Tensor,
    down_EDF: Tensor,
    options: MLPOptions,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the output [S, D] and, if ``keep``, the pre-activations [P, U]."""
    rows = Rows(x_SD, weights_SK, order)
    ends_E = torch.tensor(rows.offsets[1:], dtype=torch.int32, device=x_SD.device)
    x_PD = rows.sources(x_SD).index_select(0, rows.source_P)
    pre_PU = grouped_mm(x_PD, gate_up_EUD.mT, ends_E)
    _, h_PF, up_PF = activate(pre_PU, options)
    if up_PF is not None:
        h_PF.mul_(up_PF)
    h_PF.mul_(rows.weights_P1)
    return _sum(rows, grouped_mm(h_PF.to(x_SD.dtype), down_EDF.mT, ends_E)), pre_PU if keep else None


def backward(
    dy_SD: Tensor,
    pre_PU: Tensor | None,
    x_SD: Tensor,
    weights_SK: Tensor,
    order: ExpertOrder,
    gate_up_EUD: Tensor,
    down_EDF: Tensor,
    options: MLPOptions,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weights, gate_up and down; None where ``needs`` is False.

    If ``pre_PU`` is None, recompute the pre-activations.
    """
    rows = Rows(x_SD, weights_SK, order)
    ends_E = torch.tensor(rows.offsets[1:], dtype=torch.int32, device=x_SD.device)
    needs_x, needs_weights, needs_gate_up, needs_down = needs
    dx_SD = dweights_SK = dgate_up_EUD = ddown_EDF = None
    x_PD, dy_PD = (rows.sources(t).index_select(0, rows.source_P) for t in (x_SD, dy_SD))
    if pre_PU is None:
        pre_PU = grouped_mm(x_PD, gate_up_EUD.mT, ends_E)
    z_PF, s_PF, up_PF = activate(pre_PU, options)
    h_PF = s_PF if up_PF is None else s_PF * up_PF
    dh_PF = widen(grouped_mm(dy_PD, down_EDF, ends_E))
    if needs_down:
        ddown_EDF = F.grouped_mm(dy_PD.T, (h_PF * rows.weights_P1).to(x_SD.dtype), offs=ends_E)
    if needs_weights:
        dweights_SK = rows.unsort((h_PF * dh_PF).sum(1).to(weights_SK.dtype))
    if needs_x or needs_gate_up:
        dpre_PU = differentiate(dh_PF.mul_(rows.weights_P1), z_PF, s_PF, up_PF, options, torch.empty_like(pre_PU))
        if needs_gate_up:
            dgate_up_EUD = F.grouped_mm(dpre_PU.T, x_PD, offs=ends_E)
        if needs_x:
            dx_SD = _sum(rows, grouped_mm(dpre_PU, gate_up_EUD, ends_E))
    return dx_SD, dweights_SK, dgate_up_EUD, ddown_EDF
