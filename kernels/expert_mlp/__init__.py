"""The experts' feed-forwards on routed rows."""

# S source rows, K choices per row, D hidden, F expert width, E experts, R = S*K routed rows.

from __future__ import annotations

import torch
from torch import Tensor

from .. import pick
from .._autocast import autocast_dtype
from .._triton import backend_without_fp64
from ..activations import ACTIVATIONS
from ..checks import backend_without_values, check_device, check_offsets
from ..sort_by_expert import ExpertOrder
from . import reference, torch_ops
from .types import MLPOptions

__all__ = ["ACTIVATIONS", "expert_mlp"]


def _triton(
    x_SD: Tensor,
    weights_SK: Tensor,
    order: ExpertOrder,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    options: MLPOptions,
    recompute: bool,
) -> Tensor:
    from . import triton_ops  # only here: triton is not needed for the other backends

    return triton_ops.expert_mlp(x_SD, weights_SK, order, gate_up_EFD, down_EDF, options, recompute)


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
    comes from :func:`sort_by_expert`; its dropped rows contribute nothing. ``weights_SK`` is of any floating-point
    dtype, and is computed with in fp32, as are the sums over k (fp64 for fp64).

    Kept for the backward pass are the inputs and the pre-activation (x @ gate_up.T, R rows); with ``recompute`` the
    inputs alone, and the backward pass computes the pre-activation again. y is in x's dtype; under autocast, as with
    torch's own layers, x, gate_up and down are cast to autocast's dtype first, unless they are fp64. Gradients are in
    the inputs' own dtypes. Differentiable once in x, weights, gate_up and down, each where it asks for it; the
    gradient of an expert without rows is zero.

    Raises ValueError for shapes, dtypes, devices or an activation that do not fit and, on the CPU, for offsets that
    do not ascend from 0 to R at most. Other values of an order are not checked: with one that is not of
    ``sort_by_expert`` the result is undefined, or torch's indexing stops, but no memory outside the tensors is read or
    written.
    """
    dtype, options = autocast_dtype(x_SD.device), MLPOptions(activation, gated)
    _check(x_SD, weights_SK, order, gate_up_EFD, down_EDF, options, dtype)
    if dtype is not None and x_SD.dtype != torch.float64:
        x_SD, gate_up_EFD, down_EDF = x_SD.to(dtype), gate_up_EFD.to(dtype), down_EDF.to(dtype)
    weights_SK = weights_SK.to(torch.float64 if x_SD.dtype == torch.float64 else torch.float32)
    backend = backend_without_fp64(backend_without_values(backend, x_SD), x_SD.dtype)
    return pick("expert_mlp", _BACKENDS, backend)(x_SD, weights_SK, order, gate_up_EFD, down_EDF, options, recompute)


def _check(
    x_SD: Tensor,
    weights_SK: Tensor,
    order: ExpertOrder,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    options: MLPOptions,
    autocast: torch.dtype | None,
) -> None:
    if options.activation not in ACTIVATIONS:
        raise ValueError(f"activation={options.activation!r}: use one of {', '.join(map(repr, ACTIVATIONS))}")
    found = (x_SD.dtype, gate_up_EFD.dtype, down_EDF.dtype)
    castable = autocast is not None and torch.float64 not in found
    if any(dtype not in _DTYPES for dtype in found) or not (castable or len(set(found)) == 1):
        words = ", ".join(map(str, found))
        raise ValueError(f"x, gate_up, down={words}: give all three one dtype of fp32, bf16, fp16, fp64")
    if x_SD.dim() != 2:
        raise ValueError(f"x_SD={list(x_SD.shape)}: give rows of shape [S, D]")
    check_device(x_SD.device, weights_SK=weights_SK, gate_up=gate_up_EFD, down=down_EDF, **order._asdict())
    _check_order(order)
    sources, hidden = x_SD.shape
    if weights_SK.shape != order.inverse_SK.shape or weights_SK.shape[0] != sources:
        shapes = f"{list(weights_SK.shape)} for x {list(x_SD.shape)}"
        raise ValueError(f"weights_SK={shapes}: must be {list(order.inverse_SK.shape)}, one weight per routed row")
    if not weights_SK.is_floating_point():
        raise ValueError(f"weights_SK={weights_SK.dtype}: give floating-point weights")
    experts, width = order.offsets_E.shape[0] - 1, down_EDF.shape[-1] if down_EDF.dim() else 0
    both, name = (2 * width, "2F") if options.gated else (width, "F")
    if gate_up_EFD.shape != (experts, both, hidden) or down_EDF.shape != (experts, hidden, width):
        shapes = f"{list(gate_up_EFD.shape)}, {list(down_EDF.shape)} with gated={options.gated}"
        raise ValueError(f"gate_up, down={shapes}: must be [{experts}, {name}, {hidden}], [{experts}, {hidden}, F]")


def _check_order(order: ExpertOrder) -> None:
    order_R, inverse_SK, offsets_E = order
    shaped = order_R.dim() == 1 and inverse_SK.dim() == 2 and order_R.shape[0] == inverse_SK.numel()
    if not shaped or order_R.dtype != torch.int64 or inverse_SK.dtype != torch.int64:
        found = ", ".join(f"{t.dtype}{list(t.shape)}" for t in (order_R, inverse_SK))
        raise ValueError(f"order_R, inverse_SK={found}: must be int64 [S*K] and [S, K], as sort_by_expert returns them")
    check_offsets(offsets_E, order_R.shape[0])
