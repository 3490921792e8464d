"""One autograd.Function for implementations with torch's products.

On a CPU, many rows are multiplied expert by expert, few rows by grouped products; elsewhere, all are grouped.
"""

# S source rows, K choices per row, D hidden, F expert width, E experts, R routed rows.

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._autocast import without_autocast
from .._autograd import result
from ..checks import on_host
from ..cpu import expert_mlp as cpu
from ..cpu import few_rows
from ..sort_by_expert import ExpertOrder
from . import accelerator
from .types import MLPOptions


def _path(x_SD: Tensor, order: ExpertOrder, gate_up_EFD: Tensor, down_EDF: Tensor) -> ModuleType:
    if not on_host(x_SD):
        return accelerator
    return few_rows if few_rows.fits(order.order_R.shape[0], gate_up_EFD, down_EDF) else cpu


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_SD: Tensor,
        weights_SK: Tensor,
        gate_up_EFD: Tensor,
        down_EDF: Tensor,
        order_R: Tensor,
        inverse_SK: Tensor,
        offsets_E: Tensor,
        options: MLPOptions,
        recompute: bool,
        path: ModuleType,
    ) -> Tensor:
        order = ExpertOrder(order_R, inverse_SK, offsets_E)
        ctx.path, ctx.options = path, options
        y_SD, kept = path.forward(x_SD, weights_SK, order, gate_up_EFD, down_EDF, options, not recompute)
        ctx.save_for_backward(x_SD, weights_SK, gate_up_EFD, down_EDF, *order, *kept)
        return result(y_SD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_SD: Tensor) -> tuple[Tensor | None, ...]:
        x_SD, weights_SK, gate_up_EFD, down_EDF, *saved = ctx.saved_tensors
        order, kept = ExpertOrder(*saved[:3]), saved[3:]
        inputs = (x_SD, weights_SK, order, gate_up_EFD, down_EDF)
        with without_autocast(dy_SD.device):
            return *ctx.path.backward(dy_SD, kept, *inputs, ctx.options, ctx.needs_input_grad[:4]), *(None,) * 6


def expert_mlp(
    x_SD: Tensor,
    weights_SK: Tensor,
    order: ExpertOrder,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    options: MLPOptions,
    recompute: bool,
    path: ModuleType | None = None,
) -> Tensor:
    if path is None and on_host(x_SD) and torch.compiler.is_compiling():
        from . import compiled  # imported late, because it registers ops

        return compiled.expert_mlp(x_SD, weights_SK, order, gate_up_EFD, down_EDF, options)
    path = path or _path(x_SD, order, gate_up_EFD, down_EDF)
    inputs = (x_SD, weights_SK, gate_up_EFD, down_EDF)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
        return path.forward(x_SD, weights_SK, order, gate_up_EFD, down_EDF, options, False)[0]
    return _ExpertMLP.apply(x_SD, weights_SK, gate_up_EFD, down_EDF, *order, options, recompute, path)
