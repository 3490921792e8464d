"""One autograd.Function for implementations with torch's products: expert by expert on a CPU, grouped elsewhere."""

# S source rows, K choices per row, D hidden, F expert width, E experts, R routed rows.

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._autocast import without_autocast
from ..checks import on_host
from ..cpu import expert_mlp as cpu
from ..sort_by_expert import ExpertOrder
from . import accelerator
from .types import MLPOptions


def _path(x_SD: Tensor) -> ModuleType:
    return cpu if on_host(x_SD) else accelerator


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
        y_SD, pre_RF = ctx.path.forward(x_SD, weights_SK, order, gate_up_EFD, down_EDF, options, not recompute)
        ctx.save_for_backward(pre_RF, x_SD, weights_SK, gate_up_EFD, down_EDF, *order)
        return y_SD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_SD: Tensor) -> tuple[Tensor | None, ...]:
        pre_RF, x_SD, weights_SK, gate_up_EFD, down_EDF, *order = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        inputs = (x_SD, weights_SK, ExpertOrder(*order), gate_up_EFD, down_EDF)
        with without_autocast(dy_SD.device):
            return *ctx.path.backward(dy_SD, pre_RF, *inputs, ctx.options, needs), *(None,) * 6


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
    path = path or _path(x_SD)
    if path is cpu and torch.compiler.is_compiling():
        from . import compiled  # imported late, because it registers ops

        return compiled.expert_mlp(x_SD, weights_SK, order, gate_up_EFD, down_EDF, options)
    inputs = (x_SD, weights_SK, gate_up_EFD, down_EDF)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
        return path.forward(x_SD, weights_SK, order, gate_up_EFD, down_EDF, options, False)[0]
    return _ExpertMLP.apply(x_SD, weights_SK, gate_up_EFD, down_EDF, *order, options, recompute, path)
