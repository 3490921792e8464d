"""The ops that bring rows into expert order (permute) and back (combine)."""

# S source rows, K choices per row, D hidden, R = S*K routed rows.

from __future__ import annotations

import torch
from torch import Tensor

from .. import pick
from ..auto import automatic
from ..checks import backend_without_values, check_device, readable
from ..sort_by_expert import ExpertOrder
from . import reference, torch_ops

__all__ = ["combine", "permute"]


def _triton_permute(x_SD: Tensor, order: ExpertOrder, num_rows: int) -> Tensor:
    from . import triton_ops  # imported late, because the other backends do not need triton

    return triton_ops.permute(x_SD, order, num_rows)


def _triton_combine(rows_RD: Tensor, order: ExpertOrder) -> Tensor:
    from . import triton_ops

    return triton_ops.combine(rows_RD, order)


_PERMUTE = {"reference": reference.permute, "torch": torch_ops.permute, "triton": _triton_permute}
_COMBINE = {"reference": reference.combine, "torch": torch_ops.combine, "triton": _triton_combine}


def permute(x_SD: Tensor, order: ExpertOrder, num_rows: int | None = None, backend: str = "auto") -> Tensor:
    """Copy source rows into expert order: [num_rows, D]. Dropped rows come last and are zero.

    ``x_SD`` is [S, D] of any dtype, and ``order`` comes from :func:`sort_by_expert` for S source rows. ``num_rows``
    limits the result to the first of the R sorted rows (None: all R); pass the number of kept rows to copy no dropped
    row. Differentiable in ``x_SD``; the backward pass is :func:`combine`. Raises ValueError if shapes, dtypes or
    devices do not match.
    """
    rows, (sources, choices) = _check_order(x_SD, order)
    if x_SD.dim() != 2 or x_SD.shape[0] != sources:
        raise ValueError(
            f"x_SD={list(x_SD.shape)}: the order was made for {sources} source rows; give x of shape [{sources}, D]"
        )
    num_rows = rows if num_rows is None else num_rows
    if not 0 <= num_rows <= rows:
        raise ValueError(
            f"num_rows={num_rows}: must lie in 0..{rows}, the number of sorted rows ({sources} x {choices})"
        )
    if backend == "auto":
        backend = automatic("permute", x_SD, rows, order.offsets_E.shape[0] - 1)
    return pick("permute", _PERMUTE, backend_without_values(backend, x_SD))(x_SD, order, num_rows)


def combine(rows_RD: Tensor, order: ExpertOrder, backend: str = "auto") -> Tensor:
    """Sum each source row's K rows, in the order of k: [S, D]. Sums accumulate in fp32 (fp64 for fp64 rows).

    ``rows_RD`` holds floating-point rows in expert order: all ``offsets[E]`` kept rows, and possibly dropped ones.
    Dropped choices contribute zero, whatever their rows contain. Differentiable in ``rows_RD``; the backward pass is
    :func:`permute`. Raises ValueError if shapes, dtypes or devices do not match, if there are more rows than the order
    has and, on the CPU, if kept rows are missing. On an accelerator a missing row counts as zero.
    """
    rows, _ = _check_order(rows_RD, order)
    if rows_RD.dim() != 2 or rows_RD.shape[0] > rows:
        raise ValueError(f"rows_RD={list(rows_RD.shape)}: give at most {rows} rows of shape [R, D]")
    if not rows_RD.is_floating_point():
        raise ValueError(f"rows_RD={rows_RD.dtype}: give floating-point rows")
    some_left_out = rows_RD.shape[0] < rows
    if some_left_out and readable(order.offsets_E) and rows_RD.shape[0] < (kept := int(order.offsets_E[-1])):
        raise ValueError(f"rows_RD={list(rows_RD.shape)}: the order keeps {kept} rows; give all of them")
    if backend == "auto":
        backend = automatic("combine", rows_RD, rows, order.offsets_E.shape[0] - 1)
    return pick("combine", _COMBINE, backend_without_values(backend, rows_RD))(rows_RD, order)


def _check_order(rows: Tensor, order: ExpertOrder) -> tuple[int, torch.Size]:
    """Return R and (S, K). Raises ValueError for a malformed order, or one on another device than ``rows``."""
    order_R, inverse_SK, offsets_E = order
    fits = (order_R.dim(), inverse_SK.dim(), offsets_E.dim()) == (1, 2, 1)
    if not fits or offsets_E.numel() < 1 or not order_R.dtype == inverse_SK.dtype == offsets_E.dtype == torch.int64:
        found = ", ".join(f"{t.dtype}{list(t.shape)}" for t in order)
        raise ValueError(f"order={found}: must be int64 [R], [S, K] and [E+1], as sort_by_expert returns it")
    check_device(rows.device, order_R=order_R, inverse_SK=inverse_SK, offsets_E=offsets_E)
    if readable(offsets_E) and order_R.numel() < (kept := int(offsets_E[-1])):
        raise ValueError(f"order_R=int64{list(order_R.shape)}: the order keeps {kept} rows; give all of them")
    return order_R.numel(), inverse_SK.shape
