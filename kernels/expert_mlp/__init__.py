"""The experts' feed-forwards on routed rows."""

# S source rows, K choices per row, D hidden, F expert width, E experts, R = S*K routed rows.

from __future__ import annotations

import torch
from torch import Tensor

from .. import pick
from .._triton import without_fp64
from ..sort_by_expert import ExpertOrder
from . import reference, torch_ops
from .kind import ACTIVATIONS, Kind

__all__ = ["ACTIVATIONS", "expert_mlp"]


def _triton(
    x_SD: Tensor,
    weights_SK: Tensor,
    order: ExpertOrder,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    kind: Kind,
    recompute: bool,
) -> Tensor:
    from . import triton_ops  # only here: triton is not needed for the other backends

    return triton_ops.expert_mlp(x_SD, weights_SK, order, gate_up_EFD, down_EDF, kind, recompute)


_BACKENDS = {"reference": reference.expert_mlp, "torch": torch_ops.expert_mlp, "triton": _triton}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def expert_mlp(
    x_SD: Tensor,
    weights_SK: Tensor,
    order: ExpertOrder,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    backend: str = "auto",
    *,
    activation: str = "silu",
    gated: bool = True,
    recompute: bool = False,
) -> Tensor:
    """[S, D] y[s] = sum over k of weights[s, k] * (act(x[s] @ gate.T) * (x[s] @ up.T)) @ down.T, by (s, k)'s expert.

    ``gate_up_EFD`` is [E, 2F, D], the gate's rows first, and ``down_EDF`` [E, D, F]; both in x's dtype (fp32, bf16,
    fp16 or fp64). Experts that are not ``gated`` compute act(x[s] @ up.T) @ down.T with ``gate_up_EFD`` [E, F, D].
    ``activation`` is "silu", "gelu" (by the error function), "gelu_tanh" or "relu2" (the square of ReLU). ``order``
    comes from :func:`sort_by_expert`; its dropped rows contribute nothing. Sums over k are in fp32 (fp64 for fp64).

    Kept for the backward pass are the inputs and the pre-activation (x @ gate_up.T, R rows); with ``recompute`` the
    inputs alone, and the backward pass computes the pre-activation again. Under autocast fp32 inputs are computed,
    and y is returned, in autocast's dtype, with gradients in the inputs' own. Differentiable once in x, weights,
    gate_up and down, each where it asks for it; the gradient of an expert without rows is zero. Raises ValueError
    for shapes, dtypes or an activation that do not fit.
    """
    device = x_SD.device.type
    if torch.is_autocast_enabled(device) and x_SD.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x_SD, gate_up_EFD, down_EDF = x_SD.to(dtype), gate_up_EFD.to(dtype), down_EDF.to(dtype)
    weights_SK = weights_SK.to(torch.float64 if x_SD.dtype == torch.float64 else torch.float32)
    kind = Kind(activation, gated)
    _check(x_SD, weights_SK, order, gate_up_EFD, down_EDF, kind)
    with torch.autocast(device, enabled=False):
        run = pick("expert_mlp", _BACKENDS, without_fp64(backend, x_SD.dtype))
        return run(x_SD, weights_SK, order, gate_up_EFD, down_EDF, kind, recompute)


def _check(
    x_SD: Tensor, weights_SK: Tensor, order: ExpertOrder, gate_up_EFD: Tensor, down_EDF: Tensor, kind: Kind
) -> None:
    if kind.activation not in ACTIVATIONS:
        raise ValueError(f"activation={kind.activation!r}: use one of {', '.join(map(repr, ACTIVATIONS))}")
    if x_SD.dtype not in _DTYPES or not x_SD.dtype == gate_up_EFD.dtype == down_EDF.dtype:
        found = f"{x_SD.dtype}, {gate_up_EFD.dtype}, {down_EDF.dtype}"
        raise ValueError(f"x, gate_up, down={found}: give all three one dtype of fp32, bf16, fp16, fp64")
    sources, hidden = x_SD.shape
    experts, width = order.offsets_E.numel() - 1, down_EDF.shape[-1]
    if weights_SK.shape != order.inverse_SK.shape or weights_SK.shape[0] != sources:
        shapes = f"{list(weights_SK.shape)} for x {list(x_SD.shape)}"
        raise ValueError(f"weights_SK={shapes}: must be {list(order.inverse_SK.shape)}, one weight per routed row")
    both, name = (2 * width, "2F") if kind.gated else (width, "F")
    if gate_up_EFD.shape != (experts, both, hidden) or down_EDF.shape != (experts, hidden, width):
        shapes = f"{list(gate_up_EFD.shape)}, {list(down_EDF.shape)} with gated={kind.gated}"
        raise ValueError(f"gate_up, down={shapes}: must be [{experts}, {name}, {hidden}], [{experts}, {hidden}, F]")
