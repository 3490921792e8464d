"""The experts' SwiGLU feed-forwards on routed rows."""

# S source rows, K choices per row, D hidden, F expert width, E experts, R = S*K routed rows.

from __future__ import annotations

import torch
from torch import Tensor

from .. import pick
from ..sort_by_expert import ExpertOrder
from . import reference, torch_ops

__all__ = ["expert_mlp"]


def _triton(x_SD: Tensor, weights_SK: Tensor, order: ExpertOrder, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    from . import triton_ops  # only here: triton is not needed for the other backends

    return triton_ops.expert_mlp(x_SD, weights_SK, order, gate_up_EFD, down_EDF)


_BACKENDS = {"reference": reference.expert_mlp, "torch": torch_ops.expert_mlp, "triton": _triton}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def expert_mlp(
    x_SD: Tensor,
    weights_SK: Tensor,
    order: ExpertOrder,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    backend: str = "auto",
) -> Tensor:
    """[S, D] y[s] = sum over k of weights[s, k] * (silu(x[s] @ gate.T) * (x[s] @ up.T)) @ down.T, by (s, k)'s expert.

    ``gate_up_EFD`` is [E, 2F, D], the gate's rows first, and ``down_EDF`` [E, D, F]; both in x's dtype (fp32, bf16,
    fp16 or fp64). ``order`` comes from :func:`sort_by_expert`; its dropped rows contribute nothing. Sums over k are
    in fp32 (fp64 for fp64). Under autocast fp32 inputs are computed, and y is returned, in autocast's dtype, with
    gradients in the inputs' own. Differentiable once in x, weights, gate_up and down, each where it asks for it; the
    gradient of an expert without rows is zero. Raises ValueError for shapes or dtypes that do not fit.
    """
    device = x_SD.device.type
    if torch.is_autocast_enabled(device) and x_SD.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x_SD, gate_up_EFD, down_EDF = x_SD.to(dtype), gate_up_EFD.to(dtype), down_EDF.to(dtype)
    weights_SK = weights_SK.to(torch.float64 if x_SD.dtype == torch.float64 else torch.float32)
    _check(x_SD, weights_SK, order, gate_up_EFD, down_EDF)
    with torch.autocast(device, enabled=False):
        return pick("expert_mlp", _BACKENDS, backend)(x_SD, weights_SK, order, gate_up_EFD, down_EDF)


def _check(x_SD: Tensor, weights_SK: Tensor, order: ExpertOrder, gate_up_EFD: Tensor, down_EDF: Tensor) -> None:
    if x_SD.dtype not in _DTYPES or not x_SD.dtype == gate_up_EFD.dtype == down_EDF.dtype:
        found = f"{x_SD.dtype}, {gate_up_EFD.dtype}, {down_EDF.dtype}"
        raise ValueError(f"x, gate_up, down={found}: give all three one dtype of fp32, bf16, fp16, fp64")
    sources, hidden = x_SD.shape
    experts, width = order.offsets_E.numel() - 1, down_EDF.shape[-1]
    if weights_SK.shape != order.inverse_SK.shape or weights_SK.shape[0] != sources:
        shapes = f"{list(weights_SK.shape)} for x {list(x_SD.shape)}"
        raise ValueError(f"weights_SK={shapes}: must be {list(order.inverse_SK.shape)}, one weight per routed row")
    if gate_up_EFD.shape != (experts, 2 * width, hidden) or down_EDF.shape != (experts, hidden, width):
        shapes = f"{list(gate_up_EFD.shape)}, {list(down_EDF.shape)}"
        raise ValueError(f"gate_up, down={shapes}: must be [{experts}, 2F, {hidden}], [{experts}, {hidden}, F]")
