"""Bring rows into expert order, and back."""

# S source rows, K choices per row, D hidden, R = S*K routed rows.

from __future__ import annotations

import torch
from torch import Tensor

from .. import pick
from ..checks import backend_without_values, check_device, readable
from ..sort_by_expert import ExpertOrder
from . import reference, torch_ops

__all__ = ["combine", "permute"]


def _triton_permute(x_SD: Tensor, order: ExpertOrder, num_rows: int) -> Tensor:
    from . import triton_ops  # only here: triton is not needed for the other backends

    return triton_ops.permute(x_SD, order, num_rows)


def _triton_combine(rows_RD: Tensor, order: ExpertOrder) -> Tensor:
    from . import triton_ops

    return triton_ops.combine(rows_RD, order)


_PERMUTE = {"reference": reference.permute, "torch": torch_ops.permute, "triton": _triton_permute}
_COMBINE = {"reference": reference.combine, "torch": torch_ops.combine, "triton": _triton_combine}


def permute(x_SD: Tensor, order: ExpertOrder, num_rows: int | None = None, backend: str = "auto") -> Tensor:
    """[num_rows, D] copies of the source rows in expert order; dropped rows, which come last, are zero.

    ``num_rows`` cuts the result after so many of the R sorted rows; None keeps all. A caller who knows how many
    rows are kept passes that number and copies no dropped row. Differentiable in ``x_SD``; the backward pass is
    :func:`combine` of the rows that are there. Raises ValueError when shapes, dtypes or devices do not fit.
    """
    rows, (sources, choices) = _check_order(x_SD, order)
    if x_SD.dim() != 2 or x_SD.shape[0] != sources:
        raise ValueError(f"x_SD={list(x_SD.shape)}: the order was made for {sources} source rows of shape [S, D]")
    num_rows = rows if num_rows is None else num_rows
    if not 0 <= num_rows <= rows:
        raise ValueError(f"num_rows={num_rows}: there are {rows} sorted rows ({sources} x {choices})")
    return pick("permute", _PERMUTE, backend_without_values(backend, x_SD))(x_SD, order, num_rows)


def combine(rows_RD: Tensor, order: ExpertOrder, backend: str = "auto") -> Tensor:
    """[S, D] the sum of each source row's K rows, in the order of k, accumulated in fp32 (fp64 for fp64 rows).

    ``rows_RD`` holds floating-point rows in expert order, at least the ``offsets[E]`` kept ones. Dropped choices
    contribute zero, whatever their rows hold. Differentiable in ``rows_RD``; the backward pass is :func:`permute`.
    Raises ValueError when shapes, dtypes or devices do not fit, when there are more rows than the order has and, on
    the CPU, when kept rows are missing. On an accelerator nobody waits to look; a row that is not there counts as zero.
    """
    rows, _ = _check_order(rows_RD, order)
    if rows_RD.dim() != 2 or rows_RD.shape[0] > rows:
        raise ValueError(f"rows_RD={list(rows_RD.shape)}: give at most {rows} rows of shape [R, D]")
    if not rows_RD.is_floating_point():
        raise ValueError(f"rows_RD={rows_RD.dtype}: give floating-point rows, because they are summed in fp32 or fp64")
    if readable(order.offsets_E) and rows_RD.shape[0] < (kept := int(order.offsets_E[-1])):
        raise ValueError(f"rows_RD={list(rows_RD.shape)}: the order keeps {kept} rows; give them all")
    return pick("combine", _COMBINE, backend_without_values(backend, rows_RD))(rows_RD, order)


def _check_order(rows: Tensor, order: ExpertOrder) -> tuple[int, torch.Size]:
    """The number of sorted rows, and of sources and choices."""
    order_R, inverse_SK, offsets_E = order
    fits = (order_R.dim(), inverse_SK.dim(), offsets_E.dim()) == (1, 2, 1)
    if not fits or offsets_E.numel() < 1 or not order_R.dtype == inverse_SK.dtype == offsets_E.dtype == torch.int64:
        found = ", ".join(f"{t.dtype}{list(t.shape)}" for t in order)
        raise ValueError(f"order={found}: must be int64 [R], [S, K] and [E+1], as sort_by_expert returns it")
    check_device(rows.device, order_R=order_R, inverse_SK=inverse_SK, offsets_E=offsets_E)
    if readable(offsets_E) and order_R.numel() < (kept := int(offsets_E[-1])):
        raise ValueError(f"order_R=int64{list(order_R.shape)}: the order keeps {kept} rows; give all of them")
    return order_R.numel(), inverse_SK.shape
