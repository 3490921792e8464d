"""The router's products in Triton: exact to fp32, computed by the matrix units for bf16.

An fp32 number is the sum of three bf16 numbers. A product of two of them is exact in fp32, so a product of matrices is
the sum of the products of their terms: three if one factor is bf16, six if none is. (Of nine, the three left out are
below the last bit of fp32.) The largest product is summed by itself, so that the others do not add to its rounding.

No atomics: the tokens are cut into chunks for the weight's gradient, which are added up in a fixed order. A token's
logits do not depend on how many other tokens there are.
"""

# T tokens, D hidden, E experts. In a product [M, K] @ [K, N]: M rows, N columns, K summed, C chunks of K.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._ops import op
from .._triton import launch_on
from .tiles import MOST_CHUNKS, STEPS, tile_for


@triton.jit
def _terms(tile):
    """Return three bf16 tiles whose sum is an fp32 tile."""
    one = tile.to(tl.bfloat16)
    rest = tile - one.to(tl.float32)
    two = rest.to(tl.bfloat16)
    return one, two, (rest - two.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _add_product(a, b, high, low):
    """Add a @ b: its largest part to ``high``, the others to ``low``."""
    if a.dtype == tl.bfloat16 and b.dtype == tl.bfloat16:
        high = tl.dot(a, b, high)
    elif a.dtype == tl.bfloat16:
        b1, b2, b3 = _terms(b.to(tl.float32))
        low = tl.dot(a, b3, low)
        low = tl.dot(a, b2, low)
        high = tl.dot(a, b1, high)
    elif b.dtype == tl.bfloat16:
        a1, a2, a3 = _terms(a.to(tl.float32))
        low = tl.dot(a3, b, low)
        low = tl.dot(a2, b, low)
        high = tl.dot(a1, b, high)
    else:
        a1, a2, a3 = _terms(a.to(tl.float32))
        b1, b2, b3 = _terms(b.to(tl.float32))
        low = tl.dot(a3, b1, low)
        low = tl.dot(a1, b3, low)
        low = tl.dot(a2, b2, low)
        low = tl.dot(a2, b1, low)
        low = tl.dot(a1, b2, low)
        high = tl.dot(a1, b1, high)
    return high, low


def _product_kernel(
    a_ptr, b_ptr, out_ptr, M, N, K, a_m, a_k, b_k, b_n, steps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[c, M, N] = a[M, chunk c of K] @ b[chunk c of K, N]; a chunk is ``steps`` times BLOCK_K."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    m = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    first = tl.program_id(1) * steps
    m, inside_m, inside_n = m.to(tl.int64), (m < M)[:, None], (n < N)[None, :]
    start = first.to(tl.int64) * BLOCK_K
    a_ptrs = a_ptr + m[:, None] * a_m + (start + k)[None, :] * a_k
    b_ptrs = b_ptr + (start + k)[:, None] * b_k + n.to(tl.int64)[None, :] * b_n
    high, low = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, tl.minimum(first + steps, tl.cdiv(K, BLOCK_K))):
        inside_k = k < K - step * BLOCK_K
        a = tl.load(a_ptrs, mask=inside_m & inside_k[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=inside_k[:, None] & inside_n, other=0.0)
        high, low = _add_product(a, b, high, low)
        a_ptrs += tl.cast(BLOCK_K, tl.int64) * a_k
        b_ptrs += tl.cast(BLOCK_K, tl.int64) * b_k
    out_ptrs = out_ptr + (tl.program_id(1).to(tl.int64) * M + m)[:, None] * N + n[None, :]
    tl.store(out_ptrs, (high + low).to(out_ptr.dtype.element_ty), mask=inside_m & inside_n)


#: so that a new number of tokens, which is M or K, does not compile again
_by_token = triton.jit(do_not_specialize=["M", "steps"])(_product_kernel)
_by_weight = triton.jit(do_not_specialize=["K", "steps"])(_product_kernel)


def _product(kernel: Any, a_MK: Tensor, b_KN: Tensor, dtype: torch.dtype, most_chunks: int = 1) -> Tensor:
    """Return [M, N] a @ b in ``dtype``, summed in at most ``most_chunks`` chunks of K."""
    (rows, depth), columns = a_MK.shape, b_KN.shape[1]
    if 0 in (rows, columns, depth):
        return torch.zeros(rows, columns, dtype=dtype, device=a_MK.device)
    tile = tile_for(a_MK, b_KN)
    steps = -(-depth // tile.k)
    per_chunk = max(STEPS, -(-steps // most_chunks)) if most_chunks > 1 else steps
    chunks = -(-steps // per_chunk)
    wide = dtype if chunks == 1 else torch.float32
    out_CMN = torch.empty(chunks, rows, columns, dtype=wide, device=a_MK.device)
    with launch_on(a_MK):
        kernel[(-(-rows // tile.m) * -(-columns // tile.n), chunks)](
            a_MK, b_KN, out_CMN, rows, columns, depth, *a_MK.stride(), *b_KN.stride(), per_chunk,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out_CMN[0] if chunks == 1 else out_CMN.sum(0).to(dtype)


@op("router_logits")
def _forward(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    return _product(_by_token, x_TD, weight_ED.mT, torch.float32)


@_forward.register_fake
def _(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0], weight_ED.shape[0], dtype=torch.float32)


@op("router_logits_backward")
def _backward(dlogits_TE: Tensor, x_TD: Tensor, weight_ED: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weight; empty where ``needs`` is False."""
    dx_TD, dweight_ED = x_TD.new_empty(0), weight_ED.new_empty(0)
    if needs[0]:
        dx_TD = _product(_by_token, dlogits_TE, weight_ED, x_TD.dtype)
    if needs[1]:
        dweight_ED = _product(_by_weight, dlogits_TE.mT, x_TD, weight_ED.dtype, MOST_CHUNKS)
    return dx_TD, dweight_ED


@_backward.register_fake
def _(dlogits_TE: Tensor, x_TD: Tensor, weight_ED: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    dx_TD, dweight_ED = (
        t.new_empty(t.shape if needed else 0) for t, needed in zip((x_TD, weight_ED), needs, strict=True)
    )
    return dx_TD, dweight_ED


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dlogits_TE: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad)
    grads = _backward(dlogits_TE, *ctx.saved_tensors, needs)
    return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))


_forward.register_autograd(_differentiate, setup_context=_save)


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Run the Triton backend. Raises ValueError for fp64, and for CPU tensors unless Triton interprets."""
    if x_TD.dtype == torch.float64:
        raise ValueError("x_TD=torch.float64: the triton backend computes in fp32; use backend='torch'")
    weight_ED = weight_ED.float() if weight_ED.dtype == torch.float64 else weight_ED
    return _forward(x_TD, weight_ED)
