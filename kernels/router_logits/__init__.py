"""The op that multiplies hidden states by a router's weight, to fp32 accuracy."""

# T tokens, D hidden, E experts.

from __future__ import annotations

import torch
from torch import Tensor

from .. import pick
from .._triton import backend_without_fp64
from ..auto import automatic
from ..checks import backend_without_values, check_device
from ..matmul_tiles import MANY_ROWS
from . import reference, torch_ops

__all__ = ["router_logits"]


def _triton(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    from . import triton_ops  # imported late, because the other backends do not need triton

    return triton_ops.router_logits(x_TD, weight_ED)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_BACKENDS = {"reference": reference.router_logits, "torch": torch_ops.router_logits, "triton": _triton}


def router_logits(x_TD: Tensor, weight_ED: Tensor, backend: str = "auto") -> Tensor:
    """Multiply hidden states by a router's weight: [T, E] x @ weight.T in fp32 (fp64 for fp64 x).

    Both are fp32, bf16, fp16 or fp64, of any strides; an fp64 weight is rounded to the dtype of the result. Sums
    accumulate in fp32, and products of fp32 numbers are exact to fp32, also in the triton backend, which multiplies in
    bf16: it writes an fp32 number as the sum of three bf16 numbers. Those below 1.2e-38 may count as zero, so a number
    below 2e-31 is exact to 1.2e-38 only. Gradients have their input's dtype and are as accurate. Differentiable once
    with the triton backend.

    Numbers that are not finite make the results that depend on them infinite or NaN; with the triton backend this holds
    for numbers above 3.38e38 as well.

    The triton backend has no fp64. "auto" takes torch for fp64 and for few tokens. Raises ValueError for shapes, dtypes
    and devices that do not fit.
    """
    _check(x_TD, weight_ED)
    backend = backend_without_fp64(backend_without_values(backend, x_TD), x_TD.dtype)
    if backend == "auto":  # one tile of few tokens would do all the work on one multiprocessor
        tokens = x_TD.shape[0]
        backend = automatic("router_logits", x_TD, tokens) if tokens >= MANY_ROWS else "torch"
    return pick("router_logits", _BACKENDS, backend)(x_TD, weight_ED)


def _check(x_TD: Tensor, weight_ED: Tensor) -> None:
    for name, t in (("x_TD", x_TD), ("weight_ED", weight_ED)):
        if t.dim() != 2 or t.dtype not in _DTYPES:
            raise ValueError(f"{name}={t.dtype}{list(t.shape)}: give two dimensions, in fp32, bf16, fp16 or fp64")
    if x_TD.shape[1] != weight_ED.shape[1]:
        raise ValueError(f"weight_ED={list(weight_ED.shape)}: needs {x_TD.shape[1]} columns, as x has")
    check_device(x_TD.device, weight_ED=weight_ED)
