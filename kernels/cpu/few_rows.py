"""The experts' MLPs on a CPU for few rows: all experts at once, because calls of torch would take most of the time.

The products are torch's grouped ones, which multiply expert by expert as well, so the numbers are those of
:mod:`.expert_mlp`; only sums over more than four choices may be rounded in another order.
"""

# S source rows, K choices per row, D hidden, F expert width, U width of the pre-activation (2F or F), E experts,
# P places.

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from ..sort_by_expert import ExpertOrder
from .expert_mlp import Rows, activate, differentiate, widen
from .memory import HUGE_PAGE

if TYPE_CHECKING:
    from ..expert_mlp.types import MLPOptions


#: up to this many elements of the pre-activation; benchmarks/NOTES.md has the measurements
_FEW = 1 << 17
#: or, with many experts, up to this many of each and this many in all, on one thread and on several
_OF_EACH, _OF_ALL = 1 << 15, (1 << 19, 1 << 22)
#: bytes of a weight below which the gradients of all experts, which are new memory, cost little
_LIGHT = 8 * HUGE_PAGE


def fits(rows: int, gate_up_EUD: Tensor, down_EDF: Tensor) -> bool:
    """Tell whether there are few rows per expert, the weights are light, and torch's grouped product takes them."""
    size, (experts, both, hidden) = gate_up_EUD.element_size(), gate_up_EUD.shape
    most = max(_FEW, min(experts * _OF_EACH, _OF_ALL[torch.get_num_threads() > 1]))
    if rows * both > most or experts * both * hidden * size >= _LIGHT or gate_up_EUD.dtype == torch.float64:
        return False
    aligned = all(width and width * size % 16 == 0 for width in (hidden, both, down_EDF.shape[2]))
    return aligned and all(w.is_contiguous() and w.storage_offset() * size % 16 == 0 for w in (gate_up_EUD, down_EDF))


def _sum(rows: Rows, rows_PD: Tensor) -> Tensor:
    """[S, D] the sum over each source row's kept rows."""
    if rows.all_kept and rows_PD.dtype == torch.float32:  # fewer calls
        return rows_PD[rows.inverse_SK].sum(1)
    return rows.sum(rows_PD)


def _ends(rows: Rows, order: ExpertOrder) -> Tensor:
    """int32 [E], where each expert's places end."""
    offsets_E = torch.tensor(rows.offsets) if rows.padded else order.offsets_E
    return offsets_E[1:].int()


def forward(
    x_SD: Tensor,
    weights_SK: Tensor,
    order: ExpertOrder,
    gate_up_EUD: Tensor,
    down_EDF: Tensor,
    options: MLPOptions,
    keep: bool,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return the output [S, D] and, if ``keep``, the pre-activations [P, U] and which rows they are of."""
    rows = Rows(x_SD, weights_SK, order)
    ends_E = _ends(rows, order)
    x_PD = rows.sources(x_SD).index_select(0, rows.source_P)
    pre_PU = grouped_mm(x_PD, gate_up_EUD.mT, offs=ends_E)
    _, h_PF, up_PF = activate(pre_PU, options)
    if up_PF is not None:
        h_PF.mul_(up_PF)
    h_PF.mul_(rows.weights_P1)
    y_SD = _sum(rows, grouped_mm(h_PF.to(x_SD.dtype), down_EDF.mT, offs=ends_E))
    return y_SD, (pre_PU, ends_E, *rows.tensors) if keep else ()


def backward(
    dy_SD: Tensor,
    kept: Sequence[Tensor],
    x_SD: Tensor,
    weights_SK: Tensor,
    order: ExpertOrder,
    gate_up_EUD: Tensor,
    down_EDF: Tensor,
    options: MLPOptions,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weights, gate_up and down; None where ``needs`` is False.

    ``kept`` is what the forward kept. If that is nothing, recompute it.
    """
    rows = Rows(x_SD, weights_SK, order, kept[2:])
    ends_E = kept[1] if kept else _ends(rows, order)
    needs_x, needs_weights, needs_gate_up, needs_down = needs
    dx_SD = dweights_SK = dgate_up_EUD = ddown_EDF = None
    x_PD, dy_PD = (rows.sources(t).index_select(0, rows.source_P) for t in (x_SD, dy_SD))
    pre_PU = kept[0] if kept else grouped_mm(x_PD, gate_up_EUD.mT, offs=ends_E)
    z_PF, s_PF, up_PF = activate(pre_PU, options)
    h_PF = s_PF if up_PF is None else s_PF * up_PF
    dh_PF = widen(grouped_mm(dy_PD, down_EDF, offs=ends_E))
    if needs_down:
        ddown_EDF = grouped_mm(dy_PD.T, (h_PF * rows.weights_P1).to(x_SD.dtype), offs=ends_E)
    if needs_weights:
        dweights_SK = rows.unsort((h_PF * dh_PF).sum(1).to(weights_SK.dtype))
    if needs_x or needs_gate_up:
        dpre_PU = differentiate(dh_PF.mul_(rows.weights_P1), z_PF, s_PF, up_PF, options, torch.empty_like(pre_PU))
        if needs_gate_up:
            dgate_up_EUD = grouped_mm(dpre_PU.T, x_PD, offs=ends_E)
        if needs_x:
            dx_SD = _sum(rows, grouped_mm(dpre_PU, gate_up_EUD, offs=ends_E))
    return dx_SD, dweights_SK, dgate_up_EUD, ddown_EDF
