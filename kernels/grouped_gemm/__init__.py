"""Matrix products of rows sorted by expert with their experts' weights."""

# R rows sorted by expert, E experts, K in width, N out width, S source rows that an index gathers from.

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import pick
from .._triton import without_fp64
from . import reference, torch_ops

__all__ = ["grouped_gemm", "grouped_gemm_dgrad", "grouped_gemm_wgrad"]


def _triton() -> ModuleType:
    from . import triton_ops  # only here: triton is not needed for the other backends

    return triton_ops


_BACKENDS: dict[str, Callable[[], ModuleType]] = {
    "reference": lambda: reference,
    "torch": lambda: torch_ops,
    "triton": _triton,
}


def _module(backend: str, dtype: torch.dtype) -> ModuleType:
    return pick("grouped_gemm", _BACKENDS, without_fp64(backend, dtype))()


def grouped_gemm(
    rows: Tensor, weight_ENK: Tensor, offsets_E: Tensor, index_R: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """[R, N] out[r] = rows[r] @ weight[e].T for offsets[e] <= r < offsets[e+1]; zero for r >= offsets[E].

    ``rows`` is [R, K], or [S, K] with row r at ``index_R[r]`` (int64). ``offsets_E`` is int64 [E+1], starting at 0.
    Sums are in fp32, without TF32. Differentiable once in rows and weight. Raises ValueError for shapes or dtypes
    that do not fit.
    """
    _check(rows, offsets_E, index_R, weight_ENK, rows.shape[1], 2)
    return _GroupedGEMM.apply(rows, weight_ENK, offsets_E, index_R, backend)


def grouped_gemm_dgrad(dy_RN: Tensor, weight_ENK: Tensor, offsets_E: Tensor, backend: str = "auto") -> Tensor:
    """[R, K] dy[r] @ weight[e], the gradient of :func:`grouped_gemm`'s (gathered) rows. Not differentiable."""
    _check(dy_RN, offsets_E, None, weight_ENK, dy_RN.shape[1], 1)
    return _module(backend, dy_RN.dtype).dgrad(dy_RN.detach(), weight_ENK.detach(), offsets_E)


def grouped_gemm_wgrad(
    dy: Tensor,
    rows: Tensor,
    offsets_E: Tensor,
    dy_index_R: Tensor | None = None,
    index_R: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """[E, N, K] dy[rows of e].T @ rows[rows of e], zero for experts without rows, in dy's dtype. Not differentiable.

    Either side is gathered when its index is given. With ``out``, fp32 [E, N, K], the result is added to it, in
    fp32, and ``out`` is returned. Raises ValueError for shapes or dtypes that do not fit.
    """
    left, right = (t if i is None else i for t, i in ((dy, dy_index_R), (rows, index_R)))
    if left.shape[0] != right.shape[0] or dy.dtype != rows.dtype:
        found = f"{left.shape[0]} {dy.dtype}, {right.shape[0]} {rows.dtype}"
        raise ValueError(f"dy, rows={found}: give equally many rows of one dtype, after gathering")
    shape = (offsets_E.numel() - 1, dy.shape[1], rows.shape[1])
    if out is not None and (out.shape != shape or out.dtype != torch.float32 or not out.is_contiguous()):
        raise ValueError(f"out={out.dtype}{list(out.shape)}: must be contiguous fp32 {list(shape)}")
    with torch.no_grad():
        return _module(backend, dy.dtype).wgrad(dy, rows, offsets_E, dy_index_R, index_R, out)


def _check(rows: Tensor, offsets_E: Tensor, index_R: Tensor | None, weight_ENK: Tensor, width: int, dim: int) -> None:
    experts = offsets_E.numel() - 1
    if weight_ENK.dim() != 3 or weight_ENK.shape[0] != experts or weight_ENK.shape[dim] != width:
        raise ValueError(f"weight={list(weight_ENK.shape)}: needs {experts} experts, and {width} in dimension {dim}")
    if rows.dtype != weight_ENK.dtype:
        raise ValueError(f"rows, weight={rows.dtype}, {weight_ENK.dtype}: give both one dtype")
    if offsets_E.dtype != torch.int64 or (index_R is not None and index_R.dtype != torch.int64):
        raise ValueError(f"offsets={offsets_E.dtype}: offsets and index must be int64")


class _GroupedGEMM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight_ENK: Tensor, offsets_E: Tensor, index_R: Tensor | None, backend: str
    ) -> Tensor:
        ctx.save_for_backward(rows, weight_ENK, offsets_E, index_R)
        ctx.backend = backend
        return _module(backend, rows.dtype).forward(rows, weight_ENK, offsets_E, index_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RN: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight_ENK, offsets_E, index_R = ctx.saved_tensors
        module, drows, dweight_ENK = _module(ctx.backend, rows.dtype), None, None
        if ctx.needs_input_grad[0]:
            drows = module.dgrad(dy_RN, weight_ENK, offsets_E)
            if index_R is not None:
                # index_put sorts what it adds up, so that the order of the sum is always the same
                wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
                zeros = torch.zeros(rows.shape, dtype=wide, device=rows.device)
                drows = zeros.index_put_((index_R,), drows.to(wide), accumulate=True).to(rows.dtype)
        if ctx.needs_input_grad[1]:
            dweight_ENK = module.wgrad(dy_RN, rows, offsets_E, None, index_R, None)
        return drows, dweight_ENK, None, None, None
