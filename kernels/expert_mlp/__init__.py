"""The op that applies the experts' MLPs to routed rows."""

# S source rows, K choices per row, D hidden, F expert width, E experts, R = S*K routed rows.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import pick
from .._autocast import autocast_dtype
from .._triton import backend_without_fp64
from ..activations import ACTIVATIONS
from ..auto import automatic
from ..checks import backend_without_values, check_device, check_offsets
from ..sort_by_expert import ExpertOrder
from . import reference, torch_ops
from .types import MainGrads, MLPOptions

__all__ = ["ACTIVATIONS", "MainGrads", "expert_mlp"]


def _triton(
    x_SD: Tensor,
    weights_SK: Tensor,
    order: ExpertOrder,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    options: MLPOptions,
    recompute: bool,
    main_grads: MainGrads = (None, None),
) -> Tensor:
    from . import triton_ops  # imported late, because the other backends do not need triton

    x_SD = x_SD.contiguous()  # rows of an exchange are not: copy them once, not in every kernel that reads them
    return triton_ops.expert_mlp(x_SD, weights_SK, order, gate_up_EFD, down_EDF, options, recompute, main_grads)


def _hybrid(
    x_SD: Tensor,
    weights_SK: Tensor,
    order: ExpertOrder,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    options: MLPOptions,
    recompute: bool,
) -> Tensor:
    from . import hybrid

    x_SD = x_SD.contiguous()
    return torch_ops.expert_mlp(x_SD, weights_SK, order, gate_up_EFD, down_EDF, options, recompute, hybrid)


_BACKENDS = {
    "reference": reference.expert_mlp,
    "torch": torch_ops.expert_mlp,
    "hybrid": _hybrid,
    "triton": _triton,
}
_DTYPES = {torch.float32, torch.bfloat16, torch.float16, torch.float64}


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
    main_grads: MainGrads = (None, None),
) -> Tensor:
    """Apply its experts' MLPs to each row, and sum their outputs by router weight: [S, D].

    y[s] is the sum over k of ``weights[s, k] * (act(x[s] @ gate.T) * (x[s] @ up.T)) @ down.T``, with the weights gate,
    up and down of the expert that ``order`` assigns to choice k of row s.

    * ``x_SD`` is [S, D]. ``weights_SK`` is [S, K] of any floating-point dtype; it is used in fp32 (fp64 for fp64 rows).
    * ``order`` comes from :func:`sort_by_expert`. Its dropped choices contribute nothing.
    * ``gate_up_EFD`` is [E, 2F, D], the gate's F rows first; ``down_EDF`` is [E, D, F]. Both have x's dtype (fp32,
      bf16, fp16 or fp64). If the experts are not ``gated``, they compute ``act(x[s] @ up.T) @ down.T``, and
      ``gate_up_EFD`` is [E, F, D] and contains up.
    * ``activation`` is "silu", "gelu" (with the error function), "gelu_tanh", or "relu2" (the square of ReLU).
    * With ``recompute`` only the inputs are kept for the backward pass, which recomputes the pre-activation
      ``x @ gate_up.T``. Otherwise the pre-activation of all routed rows is kept, too, and for few rows on a CPU also
      which rows they are of.

    * ``main_grads`` are fp32 tensors of the shapes of gate_up and down, or None. A weight's gradient is added to its
      own, in fp32, by each backward pass, and autograd gets no gradient of it. The triton backend adds within the
      product that computes it; the others add a gradient in the dtype in which they compute.

    * ``backend="hybrid"`` is torch's grouped products with Triton kernels between them, for bf16 on a GPU.

    y has x's dtype. The sums over k accumulate in fp32 (fp64 for fp64). Under autocast x, gate_up and down are first
    cast to autocast's dtype unless they are fp64, as in torch's own layers. Each gradient has its input's dtype.
    Differentiable once in x, weights, gate_up and down, whichever require it. The gradient of an expert without rows is
    zero.

    Under ``torch.compile`` the op is part of one graph with every backend but the reference. The compiler does not look
    into the torch backend on a CPU, which reads how many rows each expert has; there the backward then recomputes, as
    with ``recompute``.

    Raises ValueError if shapes, dtypes, devices or the activation do not fit and, on the CPU, if the order's offsets do
    not ascend from 0 to at most R. The other values of an order are not checked: if it does not come from
    ``sort_by_expert``, the result is undefined or torch's indexing raises, but no memory outside the tensors is read or
    written.
    """
    dtype, options = autocast_dtype(x_SD.device), MLPOptions(activation, gated)
    _check(x_SD, weights_SK, order, gate_up_EFD, down_EDF, options, dtype)
    if dtype is not None and x_SD.dtype != torch.float64:
        x_SD, gate_up_EFD, down_EDF = x_SD.to(dtype), gate_up_EFD.to(dtype), down_EDF.to(dtype)
    weights_SK = weights_SK.to(torch.float64 if x_SD.dtype == torch.float64 else torch.float32)
    backend = backend_without_fp64(backend_without_values(backend, x_SD), x_SD.dtype)
    if backend == "auto":
        sizes = (order.order_R.shape[0], order.offsets_E.shape[0] - 1, down_EDF.shape[1:])
        backend = automatic("expert_mlp", x_SD, *sizes)
    rest = options, recompute
    if any(main_grad is not None for main_grad in main_grads):
        _check_main_grads(main_grads, gate_up_EFD, down_EDF)
        if backend == "triton":
            rest += (main_grads,)  # type: ignore[assignment]
        else:
            gate_up_EFD, down_EDF = map(_added_to, (gate_up_EFD, down_EDF), main_grads)
    return pick("expert_mlp", _BACKENDS, backend)(x_SD, weights_SK, order, gate_up_EFD, down_EDF, *rest)


class _AddedTo(torch.autograd.Function):
    """Returns a weight. The backward adds its gradient to ``main_grad`` and passes none on."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, main_grad: Tensor) -> Tensor:
        ctx.main_grad = main_grad  # not saved: other micro-batches change it before the backward
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        ctx.main_grad.add_(grad)
        return None, None


def _added_to(weight: Tensor, main_grad: Tensor | None) -> Tensor:
    return weight if main_grad is None else _AddedTo.apply(weight, main_grad)


def _check_main_grads(main_grads: MainGrads, *weights: Tensor) -> None:
    for name, main_grad, weight in zip(("gate_up", "down"), main_grads, weights, strict=True):
        if main_grad is None:
            continue
        check_device(weight.device, main_grads=main_grad)
        if main_grad.dtype != torch.float32 or main_grad.shape != weight.shape or not main_grad.is_contiguous():
            found, shape = f"{main_grad.dtype}{list(main_grad.shape)}", list(weight.shape)
            raise ValueError(f"main_grads={found} of {name}: must be contiguous fp32 {shape}")


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
    dtypes = set(found)
    if not dtypes <= _DTYPES or not (castable or len(dtypes) == 1):
        words = ", ".join(map(str, found))
        raise ValueError(f"x, gate_up, down={words}: give all three the same dtype, one of fp32, bf16, fp16 and fp64")
    if x_SD.dim() != 2:
        raise ValueError(f"x_SD={list(x_SD.shape)}: give rows of shape [S, D]")
    check_device(x_SD.device, weights_SK=weights_SK, gate_up=gate_up_EFD, down=down_EDF, **order._asdict())
    _check_order(order)
    sources, hidden = x_SD.shape
    if weights_SK.shape != order.inverse_SK.shape or weights_SK.shape[0] != sources:
        shapes = f"{list(weights_SK.shape)} for x {list(x_SD.shape)}"
        raise ValueError(f"weights_SK={shapes}: must be {list(order.inverse_SK.shape)}, one weight per choice")
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
