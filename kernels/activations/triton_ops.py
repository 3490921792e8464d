"""The activations in Triton, as parts of the matrix kernels."""

# R rows sorted by expert, F expert width, U width of the pre-activation (2F or F).

from __future__ import annotations

import triton
import triton.language as tl


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
