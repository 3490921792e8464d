"""The activations in Triton: as parts of the matrix kernels, and as kernels between two products of another library.

Both kernels apply the router weights, so that a weighted row of the hidden size is never needed.
"""

# R rows sorted by expert, F expert width, U width of the pre-activation (2F or F), S source rows, K choices per row.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._ops import op
from .._triton import launch_on

#: rows, columns and warps of a program: each thread has 32 bytes of every 16-bit tensor
_ROWS, _COLUMNS, _WARPS = 4, 512, 4


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """Return (act(z), act'(z)) in fp32. The compiler eliminates an unused result."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(z)
        value = z * sigmoid
        slope = sigmoid + value * (1.0 - sigmoid)
    elif ACTIVATION == "gelu":
        below = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        value = z * below
        slope = below + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2u)
        sigmoid = tl.sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * z * z))
        value = z * sigmoid
        slope = sigmoid + value * (1.0 - sigmoid) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        positive = tl.where(z < 0.0, 0.0, z)  # keeps NaN, unlike tl.maximum
        value = positive * positive
        slope = 2.0 * positive
    return value, slope


@triton.jit
def store_gradients(
    dh,
    first,
    m,
    stop,
    w,
    pre_ptr,
    h_ptr,
    dpre_ptr,
    F,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store columns of weighted h and of dpre from ``first`` on, and return their part of <dh, h>, [rows]."""
    n = first + tl.arange(0, COLUMNS)
    mask = (m[:, None] < stop) & (n[None, :] < F)
    pre_at = m[:, None] * (2 * F if GATED else F) + n[None, :]
    z = tl.load(pre_ptr + pre_at, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(pre_ptr + pre_at + F, mask=mask, other=0.0).to(tl.float32)
    value, slope = activate(z, ACTIVATION)
    h = value
    if GATED:
        h *= up
        slope *= up
    products = tl.sum(dh * h, 1)
    tl.store(h_ptr + m[:, None] * F + n[None, :], (h * w).to(h_ptr.dtype.element_ty), mask=mask)
    dh *= w
    tl.store(dpre_ptr + pre_at, (dh * slope).to(dpre_ptr.dtype.element_ty), mask=mask)
    if GATED:
        tl.store(dpre_ptr + pre_at + F, (dh * value).to(dpre_ptr.dtype.element_ty), mask=mask)
    return products


@triton.jit
def _weights(flat_ptr, weights_ptr, m, num_rows, routed):
    """Return the router weights of sorted rows, [rows, 1]. Invalid indices never access memory outside the tensors."""
    flat = tl.load(flat_ptr + m, mask=m < num_rows, other=0)
    return tl.load(weights_ptr + tl.minimum(tl.maximum(flat, 0), routed - 1))[:, None]


@triton.jit(do_not_specialize=["num_rows", "routed"])
def _activate_kernel(
    pre_ptr,
    flat_ptr,
    weights_ptr,
    h_ptr,
    num_rows,
    routed,
    F,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """h[R, F] = w * act(gate) * up, or w * act(pre)."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (m[:, None] < num_rows) & (n[None, :] < F)
    at = m[:, None] * (2 * F if GATED else F) + n[None, :]
    h, slope = activate(tl.load(pre_ptr + at, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        h *= tl.load(pre_ptr + at + F, mask=mask, other=0.0).to(tl.float32)
    h *= _weights(flat_ptr, weights_ptr, m, num_rows, routed)
    tl.store(h_ptr + m[:, None] * F + n[None, :], h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "routed"])
def _gradient_kernel(
    dh_ptr,
    pre_ptr,
    flat_ptr,
    weights_ptr,
    h_ptr,
    dpre_ptr,
    dweights_ptr,
    num_rows,
    routed,
    F,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute weighted h[R, F], dpre[R, U] and dweights[R] from dh[R, F], the gradient of h before it is weighted."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    w = _weights(flat_ptr, weights_ptr, m, num_rows, routed)
    dw = tl.zeros((ROWS,), tl.float32)
    for first in range(0, F, COLUMNS):
        n = first + tl.arange(0, COLUMNS)
        mask = (m[:, None] < num_rows) & (n[None, :] < F)
        dh = tl.load(dh_ptr + m[:, None] * F + n[None, :], mask=mask, other=0.0).to(tl.float32)
        dw += store_gradients(
            dh, first, m, num_rows, w, pre_ptr, h_ptr, dpre_ptr, F, ACTIVATION, GATED, COLUMNS
        )  # fmt: skip
    tl.store(dweights_ptr + m, dw, mask=m < num_rows)


@op("activate")
def activate_rows(pre_RU: Tensor, weights_SK: Tensor, order_R: Tensor, activation: str, gated: bool) -> Tensor:
    """Return [R, F] w * act(gate) * up, or w * act(pre), w being the weight of sorted row r, ``weights[order[r]]``."""
    num_rows, width = pre_RU.shape[0], pre_RU.shape[1] // (2 if gated else 1)
    h_RF = pre_RU.new_empty(num_rows, width)
    if h_RF.numel():
        with launch_on(pre_RU):
            _activate_kernel[(triton.cdiv(num_rows, _ROWS), triton.cdiv(width, _COLUMNS))](
                pre_RU.contiguous(),
                order_R.contiguous(),
                weights_SK.contiguous(),
                h_RF,
                num_rows,
                weights_SK.numel(),
                width,
                ACTIVATION=activation,
                GATED=gated,
                ROWS=_ROWS,
                COLUMNS=_COLUMNS,
                num_warps=_WARPS,
            )
    return h_RF


@activate_rows.register_fake
def _(pre_RU: Tensor, weights_SK: Tensor, order_R: Tensor, activation: str, gated: bool) -> Tensor:
    return pre_RU.new_empty(pre_RU.shape[0], pre_RU.shape[1] // (2 if gated else 1))


@op("activate_backward")
def differentiate_rows(
    dh_RF: Tensor, pre_RU: Tensor, weights_SK: Tensor, order_R: Tensor, activation: str, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :func:`activate_rows` returned, and the gradients of pre [R, U] and of each row's weight, fp32 [R].

    ``dh_RF`` is the gradient of h before it is weighted.
    """
    num_rows, width = dh_RF.shape
    h_RF, dpre_RU = dh_RF.new_empty(dh_RF.shape), pre_RU.new_empty(pre_RU.shape)
    dweights_R = torch.zeros(num_rows, dtype=torch.float32, device=dh_RF.device)
    if h_RF.numel():
        with launch_on(dh_RF):
            _gradient_kernel[(triton.cdiv(num_rows, _ROWS),)](
                dh_RF.contiguous(),
                pre_RU.contiguous(),
                order_R.contiguous(),
                weights_SK.contiguous(),
                h_RF,
                dpre_RU,
                dweights_R,
                num_rows,
                weights_SK.numel(),
                width,
                ACTIVATION=activation,
                GATED=gated,
                ROWS=_ROWS,
                COLUMNS=_COLUMNS,
                num_warps=_WARPS,
            )
    return h_RF, dpre_RU, dweights_R


@differentiate_rows.register_fake
def _(dh_RF: Tensor, pre_RU: Tensor, weights_SK: Tensor, order_R: Tensor, activation: str, gated: bool):
    return (
        dh_RF.new_empty(dh_RF.shape),
        pre_RU.new_empty(pre_RU.shape),
        dh_RF.new_empty(dh_RF.shape[0], dtype=torch.float32),
    )
