"""The ops that multiply rows sorted by expert by their experts' weights."""

# R rows sorted by expert, E experts, K in width, N out width, S source rows that an index gathers from.

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import pick
from .._autograd import result
from .._triton import backend_without_fp64
from ..checks import backend_without_values, check_device, check_index, check_offsets
from . import reference, torch_ops

__all__ = ["grouped_gemm", "grouped_gemm_dgrad", "grouped_gemm_wgrad"]


def _triton(first: Tensor, name: str, *rest: Tensor | None) -> Tensor:
    from . import triton_ops  # imported late, because the other backends do not need triton

    return getattr(triton_ops, name)(first, *rest)


def _in(module: ModuleType) -> Callable[..., Tensor]:
    return lambda first, name, *rest: getattr(module, name)(first, *rest)


_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": _in(reference),
    "torch": _in(torch_ops),
    "triton": _triton,
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _run(name: str, backend: str, first: Tensor, *rest: Tensor | None) -> Tensor:
    """Call the function ``name`` of a backend's module."""
    backend = backend_without_fp64(backend_without_values(backend, first), first.dtype)
    return pick("grouped_gemm", _BACKENDS, backend)(first, name, *rest)


def grouped_gemm(
    rows: Tensor, weight_ENK: Tensor, offsets_E: Tensor, index_R: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Multiply each row by its expert's weight: [R, N] out[r] = rows[r] @ weight[e].T, e being the expert of row r.

    * ``rows`` is [R, K], sorted by expert, or [S, K] if ``index_R`` is given: then row r is ``rows[index_R[r]]``.
      ``index_R`` is int64 [R] with entries in 0..S-1.
    * ``weight_ENK`` is [E, N, K], in the dtype of rows: fp32, bf16, fp16 or fp64.
    * ``offsets_E`` is int64 [E+1]: rows ``offsets[e]:offsets[e+1]`` belong to expert e. It begins at 0, never
      decreases, and ends at R or less. Rows past ``offsets[E]`` belong to no expert, and their results are zero.

    The result and the gradients have the dtype of rows, also under autocast; sums accumulate in fp32 (fp64 for fp64).
    Differentiable once in rows and weight.

    Raises ValueError if shapes, dtypes or devices do not fit and, on the CPU, for invalid offsets or indices. On other
    devices the values are not checked: the result is then undefined, or torch stops with a device-side assertion, but
    no memory outside the tensors is read or written.
    """
    _check(rows, weight_ENK, offsets_E, index_R, 2)
    return _GroupedGEMM.apply(rows, weight_ENK, offsets_E, index_R, backend)


def grouped_gemm_dgrad(dy_RN: Tensor, weight_ENK: Tensor, offsets_E: Tensor, backend: str = "auto") -> Tensor:
    """Compute the gradient of :func:`grouped_gemm` with respect to its sorted rows: [R, K] dy[r] @ weight[e].

    Arguments and errors are like those of :func:`grouped_gemm`; ``dy_RN`` is [R, N]. Not differentiable.
    """
    _check(dy_RN, weight_ENK, offsets_E, None, 1)
    return _run("dgrad", backend, dy_RN.detach(), weight_ENK.detach(), offsets_E)


def grouped_gemm_wgrad(
    dy: Tensor,
    rows: Tensor,
    offsets_E: Tensor,
    dy_index_R: Tensor | None = None,
    index_R: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute the gradient of :func:`grouped_gemm` with respect to the weight: [E, N, K] dy_e.T @ rows_e per expert.

    The gradient is zero for experts without rows, and has dy's dtype. Each of ``dy`` (width N) and ``rows`` (width K)
    is gathered if its index is given. If ``out`` is given, contiguous fp32 [E, N, K], the result is added to it in
    fp32, and ``out`` is returned. Dtypes, offsets, indices and errors: see :func:`grouped_gemm`. Not differentiable.
    """
    left = _num_rows("dy", dy, "dy_index_R", dy_index_R)
    right = _num_rows("rows", rows, "index_R", index_R)
    if left != right or dy.dtype != rows.dtype:
        found = f"{left} {dy.dtype}, {right} {rows.dtype}"
        raise ValueError(f"dy, rows={found}: give equally many rows (after gathering) of the same dtype")
    check_device(dy.device, rows=rows, offsets_E=offsets_E, dy_index_R=dy_index_R, index_R=index_R, out=out)
    check_offsets(offsets_E, left)
    shape = (offsets_E.shape[0] - 1, dy.shape[1], rows.shape[1])
    if out is not None and (out.shape != shape or out.dtype != torch.float32 or not out.is_contiguous()):
        raise ValueError(f"out={out.dtype}{list(out.shape)}: must be contiguous fp32 {list(shape)}")
    with torch.no_grad():
        return _run("wgrad", backend, dy, rows, offsets_E, dy_index_R, index_R, out)


def _num_rows(name: str, rows: Tensor, index_name: str, index_R: Tensor | None) -> int:
    """Return the number of rows after gathering. Raises ValueError for malformed rows or a malformed index."""
    if rows.dim() != 2 or rows.dtype not in _DTYPES:
        raise ValueError(
            f"{name}={rows.dtype}{list(rows.shape)}: give rows of shape [R, width] in fp32, bf16, fp16 or fp64"
        )
    if index_R is None:
        return rows.shape[0]
    check_index(index_name, index_R, rows.shape[0])
    return index_R.shape[0]


def _check(rows: Tensor, weight_ENK: Tensor, offsets_E: Tensor, index_R: Tensor | None, dim: int) -> None:
    """Raise ValueError for inputs that do not fit. Dimension ``dim`` of the weight must match the width of the rows."""
    check_device(rows.device, weight=weight_ENK, offsets_E=offsets_E, index_R=index_R)
    check_offsets(offsets_E, _num_rows("rows" if dim == 2 else "dy", rows, "index_R", index_R))
    experts, width = offsets_E.shape[0] - 1, rows.shape[1]
    if weight_ENK.dim() != 3 or weight_ENK.shape[0] != experts or weight_ENK.shape[dim] != width:
        raise ValueError(f"weight={list(weight_ENK.shape)}: needs {experts} experts, and {width} in dimension {dim}")
    if rows.dtype != weight_ENK.dtype:
        raise ValueError(f"rows, weight={rows.dtype}, {weight_ENK.dtype}: give both the same dtype")


class _GroupedGEMM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight_ENK: Tensor, offsets_E: Tensor, index_R: Tensor | None, backend: str
    ) -> Tensor:
        ctx.save_for_backward(rows, weight_ENK, offsets_E, index_R)
        ctx.backend = backend
        return result(_run("forward", backend, rows, weight_ENK, offsets_E, index_R))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RN: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight_ENK, offsets_E, index_R = ctx.saved_tensors
        drows = dweight_ENK = None
        if ctx.needs_input_grad[0]:
            drows = _run("dgrad", ctx.backend, dy_RN, weight_ENK, offsets_E)
            if index_R is not None:
                # index_put sorts its indices, so it always adds in the same order
                wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
                zeros = torch.zeros(rows.shape, dtype=wide, device=rows.device)
                drows = zeros.index_put_((index_R,), drows.to(wide), accumulate=True).to(rows.dtype)
        if ctx.needs_input_grad[1]:
            dweight_ENK = _run("wgrad", ctx.backend, dy_RN, rows, offsets_E, None, index_R, None)
        return drows, dweight_ENK, None, None, None
