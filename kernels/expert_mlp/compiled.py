"""The torch backend on a CPU as an op of its own, for torch.compile.

Which products it runs depends on how many rows each expert has, which a graph cannot express. The compiler does not
look into the op.
"""

# S source rows, K choices per row, D hidden, F expert width, E experts, R routed rows.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._autocast import without_autocast
from ..cpu import expert_mlp as cpu
from ..sort_by_expert import ExpertOrder
from .types import MLPOptions


@torch.library.custom_op("equimoe::cpu_expert_mlp", mutates_args=())
def _forward(
    x_SD: Tensor,
    weights_SK: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    order_R: Tensor,
    inverse_SK: Tensor,
    offsets_E: Tensor,
    activation: str,
    gated: bool,
) -> Tensor:
    order = ExpertOrder(order_R, inverse_SK, offsets_E)
    return cpu.forward(x_SD, weights_SK, order, gate_up_EFD, down_EDF, MLPOptions(activation, gated), False)[0]


@_forward.register_fake
def _(x_SD, weights_SK, gate_up_EFD, down_EDF, order_R, inverse_SK, offsets_E, activation, gated):
    return x_SD.new_empty(x_SD.shape)


@torch.library.custom_op("equimoe::cpu_expert_mlp_backward", mutates_args=())
def _backward(
    dy_SD: Tensor,
    x_SD: Tensor,
    weights_SK: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    order_R: Tensor,
    inverse_SK: Tensor,
    offsets_E: Tensor,
    activation: str,
    gated: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weights, gate_up and down; empty where ``needs`` is False."""
    order, options = ExpertOrder(order_R, inverse_SK, offsets_E), MLPOptions(activation, gated)
    needed = (needs[0], needs[1], needs[2], needs[3])
    with without_autocast(dy_SD.device):
        found = cpu.backward(dy_SD, (), x_SD, weights_SK, order, gate_up_EFD, down_EDF, options, needed)
    dx_SD, dweights_SK, dgate_up_EFD, ddown_EDF = (x_SD.new_empty(0) if t is None else t for t in found)
    return dx_SD, dweights_SK, dgate_up_EFD, ddown_EDF


@_backward.register_fake
def _(dy_SD, x_SD, weights_SK, gate_up_EFD, down_EDF, order_R, inverse_SK, offsets_E, activation, gated, needs):
    inputs = (x_SD, weights_SK, gate_up_EFD, down_EDF)
    return tuple(t.new_empty(t.shape) if n else x_SD.new_empty(0) for t, n in zip(inputs, needs, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _autograd(ctx: Any, dy_SD: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    found = _backward(dy_SD, *ctx.saved_tensors, *ctx.options, needs)
    return *(t if needed else None for t, needed in zip(found, needs, strict=True)), *(None,) * 5


_forward.register_autograd(_autograd, setup_context=_setup_context)


def expert_mlp(
    x_SD: Tensor,
    weights_SK: Tensor,
    order: ExpertOrder,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    options: MLPOptions,
) -> Tensor:
    """Compute like the torch backend. The backward recomputes pre-activations: their number varies with the routing."""
    return _forward(x_SD, weights_SK, gate_up_EFD, down_EDF, *order, *options)
