"""The experts' MLPs in Triton, without host synchronisation. Kernels gather rows as they load them.

Forward: the up product of gathered rows (gate and up in one tile), which stores the pre-activation and
``w * act(gate) * up``; the down product; the sum over k. Backward: the product for dh, which recomputes the activation
and stores its gradient and that of the router weight, <dh, h>, so that neither h nor the rows before the sum need to be
kept; three grouped products; the sum over k.

What is kept for the backward pass, in 16 bits: x and the pre-activation, 2*S*D + 4*R*F bytes (2*S*D + 2*R*F without a
gate), or with ``recompute`` x alone, at the cost of one more product. The router weight's gradient consists of one
partial sum per column tile, added up in a fixed order without atomics.
"""

# S source rows, K choices per row, D hidden, F expert width, U width of the pre-activation (2F or F), E experts,
# R = S*K routed rows, P column tiles.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._ops import op
from .._triton import launch_on
from ..activations.triton_ops import activate, store_gradients
from ..grouped_gemm.triton_ops import (
    clamp,
    gemm,
    halves,
    launch_options,
    load_rows,
    load_weight,
    locate,
    precision,
    tile_for,
    tile_map,
    weight_grad,
    weight_tile,
)
from ..permute.triton_ops import sum_rows
from ..sort_by_expert import ExpertOrder
from .types import MainGrads, MLPOptions


@triton.jit
def _store_up(
    acc,
    first,
    m,
    stop,
    w,
    pre_ptr,
    h_ptr,
    F,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store columns of the up product from ``first`` on: h, and pre if KEEP. If GATED, gate and up alternate in acc."""
    n = first + tl.arange(0, COLUMNS)
    mask = (m[:, None] < stop) & (n[None, :] < F)
    h_ptrs = h_ptr + m[:, None] * F + n[None, :]
    if GATED:
        z, up = acc.reshape(ROWS, COLUMNS, 2).split()
        if KEEP:
            pre_ptrs = pre_ptr + m[:, None] * (2 * F) + n[None, :]
            tl.store(pre_ptrs, z.to(pre_ptr.dtype.element_ty), mask=mask)
            tl.store(pre_ptrs + F, up.to(pre_ptr.dtype.element_ty), mask=mask)
        h, slope = activate(z, ACTIVATION)
        h *= up
    else:
        if KEEP:
            tl.store(pre_ptr + m[:, None] * F + n[None, :], acc.to(pre_ptr.dtype.element_ty), mask=mask)
        h, slope = activate(acc, ACTIVATION)
    tl.store(h_ptrs, (h * w).to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tiles", "routed"])
def _up_kernel(
    x_ptr,
    flat_ptr,
    weights_ptr,
    gate_up_ptr,
    pre_ptr,
    h_ptr,
    tiles_ptr,
    num_tiles,
    routed,
    choices,
    E,
    F,
    D,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    KEEP: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """pre[R, U] = x[flat // choices] @ gate_up[e].T (if KEEP), and h[R, F] = w * act(gate) * up, or w * act(pre).

    Gate and up are one product of twice the width, because a wider matrix instruction reads less shared memory per
    operation. The weights stay as they are: the tile's columns are loaded from gate and up in turn, so that a thread
    gets both factors of h. Dropped rows of pre are set to zero, because pre is an output of a custom op and must be
    written completely. Dropped rows of h are never read.
    """
    parts: tl.constexpr = 2 if GATED else 1
    WIDTH: tl.constexpr = BLOCK_N // parts
    expert, column, m, source, stop = locate(tiles_ptr, num_tiles, tl.cdiv(F, WIDTH), BLOCK_M, GROUP)
    if (expert < 0) | ((expert == E) & (not KEEP)):
        return
    j, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    n = column * WIDTH + j // parts
    flat = clamp(tl.load(flat_ptr + source), routed)
    a_ptrs = x_ptr + (flat // choices)[:, None] * D + k[None, :]
    b_ptrs = weight_tile(gate_up_ptr, expert * parts * F * D, j % parts * F + n, k, F, D, False)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    steps = tl.cdiv(D, BLOCK_K)
    if expert == E:
        steps = 0
    for step in range(0, steps):
        left = D - step * BLOCK_K
        a = load_rows(a_ptrs, k, left, EVEN)
        acc = tl.dot(a, load_weight(b_ptrs, n, F, k, left, EVEN), acc, input_precision=PRECISION)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K
    w, first = tl.load(weights_ptr + flat)[:, None], column * WIDTH
    if BLOCK_N > 128:
        one, two = halves(acc, BLOCK_M, BLOCK_N)
        half: tl.constexpr = WIDTH // 2
        _store_up(one, first, m, stop, w, pre_ptr, h_ptr, F, ACTIVATION, GATED, KEEP, BLOCK_M, half)
        _store_up(two, first + half, m, stop, w, pre_ptr, h_ptr, F, ACTIVATION, GATED, KEEP, BLOCK_M, half)
    else:
        _store_up(acc, first, m, stop, w, pre_ptr, h_ptr, F, ACTIVATION, GATED, KEEP, BLOCK_M, WIDTH)


@triton.jit(do_not_specialize=["num_tiles", "routed"])
def _up_grad_kernel(
    dy_ptr,
    flat_ptr,
    weights_ptr,
    down_ptr,
    pre_ptr,
    h_ptr,
    dpre_ptr,
    dweights_ptr,
    tiles_ptr,
    num_tiles,
    routed,
    choices,
    E,
    F,
    D,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Compute dh = dy[flat // choices] @ down[e], and from dh and pre: weighted h[R, F], dpre[R, U], dweights[R, P]."""
    columns = tl.cdiv(F, BLOCK_N)
    expert, column, m, source, stop = locate(tiles_ptr, num_tiles, columns, BLOCK_M, GROUP)
    if (expert < 0) | (expert == E):
        return
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    flat = clamp(tl.load(flat_ptr + source), routed)
    a_ptrs = dy_ptr + (flat // choices)[:, None] * D + k[None, :]
    b_ptrs = weight_tile(down_ptr, expert * D * F, n, k, F, D, True)
    b_step = tl.cast(BLOCK_K, tl.int64) * F
    dh = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, tl.cdiv(D, BLOCK_K)):
        left = D - step * BLOCK_K
        a = load_rows(a_ptrs, k, left, EVEN)
        dh = tl.dot(a, load_weight(b_ptrs, n, F, k, left, EVEN), dh, input_precision=PRECISION)
        a_ptrs += BLOCK_K
        b_ptrs += b_step
    w, first = tl.load(weights_ptr + flat)[:, None], column * BLOCK_N
    if BLOCK_N > 64:
        one, two = halves(dh, BLOCK_M, BLOCK_N)
        half: tl.constexpr = BLOCK_N // 2
        dw = store_gradients(one, first, m, stop, w, pre_ptr, h_ptr, dpre_ptr, F, ACTIVATION, GATED, half)
        dw += store_gradients(two, first + half, m, stop, w, pre_ptr, h_ptr, dpre_ptr, F, ACTIVATION, GATED, half)
    else:
        dw = store_gradients(dh, first, m, stop, w, pre_ptr, h_ptr, dpre_ptr, F, ACTIVATION, GATED, BLOCK_N)
    tl.store(dweights_ptr + m * columns + column, dw, mask=m < stop)


def _up(
    x_SD: Tensor,
    weights_SK: Tensor,
    gate_up_EFD: Tensor,
    order_R: Tensor,
    offsets_E: Tensor,
    options: MLPOptions,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return h [R, F], weighted, and the pre-activations [R, U] (without rows unless ``keep``)."""
    experts, both, hidden = gate_up_EFD.shape
    parts = 2 if options.gated else 1
    num_rows, width = order_R.shape[0], both // parts
    tile = tile_for("gated" if options.gated else "plain", x_SD, num_rows, experts, gate_up_EFD, width, hidden)
    tiles_3T = tile_map(offsets_E, num_rows, tile.m)
    pre_RU = x_SD.new_empty(num_rows if keep else 0, both)
    h_RF = x_SD.new_empty(num_rows, width)
    num_tiles = tiles_3T.shape[1]
    with launch_on(x_SD):
        _up_kernel[(num_tiles * -(-width // (tile.n // parts)),)](
            x_SD.contiguous(),
            order_R.contiguous(),
            weights_SK.contiguous(),
            gate_up_EFD.contiguous(),
            pre_RU,
            h_RF,
            tiles_3T,
            num_tiles,
            weights_SK.numel(),
            weights_SK.shape[1],
            experts,
            width,
            hidden,
            ACTIVATION=options.activation,
            GATED=options.gated,
            KEEP=keep,
            EVEN=hidden % tile.k == 0,
            **launch_options(tile, precision(x_SD.dtype)),
        )
    return h_RF, pre_RU


def _up_grad(
    dy_SD: Tensor,
    pre_RU: Tensor,
    weights_SK: Tensor,
    down_EDF: Tensor,
    order_R: Tensor,
    offsets_E: Tensor,
    options: MLPOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return h [R, F], weighted, and the gradients of the pre-activations [R, U] and of the weights, partial [R, P]."""
    experts, hidden, width = down_EDF.shape
    num_rows = order_R.shape[0]
    tile = tile_for("gated_grad", dy_SD, num_rows, experts, down_EDF, width, hidden)
    tiles_3T = tile_map(offsets_E, num_rows, tile.m)
    num_tiles, columns = tiles_3T.shape[1], -(-width // tile.n)
    h_RF, dpre_RU = pre_RU.new_empty(num_rows, width), torch.empty_like(pre_RU)
    dweights_RP = torch.empty(num_rows, columns, dtype=torch.float32, device=dy_SD.device)
    with launch_on(dy_SD):
        _up_grad_kernel[(num_tiles * columns,)](
            dy_SD,
            order_R.contiguous(),
            weights_SK.contiguous(),
            down_EDF.contiguous(),
            pre_RU,
            h_RF,
            dpre_RU,
            dweights_RP,
            tiles_3T,
            num_tiles,
            weights_SK.numel(),
            weights_SK.shape[1],
            experts,
            width,
            hidden,
            ACTIVATION=options.activation,
            GATED=options.gated,
            EVEN=hidden % tile.k == 0,
            **launch_options(tile, precision(down_EDF.dtype)),
        )
    return h_RF, dpre_RU, dweights_RP


@op("expert_mlp")
def _forward(
    x_SD: Tensor,
    weights_SK: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    order_R: Tensor,
    inverse_SK: Tensor,
    offsets_E: Tensor,
    activation: str,
    gated: bool,
    keep: bool,
    gate_up_main: Tensor | None,
    down_main: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the output [S, D] and the pre-activations [R, U] (without rows unless ``keep``)."""
    options = MLPOptions(activation, gated)
    h_RF, pre_RU = _up(x_SD, weights_SK, gate_up_EFD, order_R, offsets_E, options, keep)
    return sum_rows(gemm(h_RF, down_EDF, offsets_E), inverse_SK), pre_RU


@_forward.register_fake
def _(x_SD, weights_SK, gate_up_EFD, down_EDF, order_R, inverse_SK, offsets_E, activation, gated, keep, *main_grads):
    return x_SD.new_empty(x_SD.shape), x_SD.new_empty(order_R.shape[0] if keep else 0, gate_up_EFD.shape[1])


@op("expert_mlp_backward", mutates_args=("gate_up_main", "down_main"))
def _backward(
    dy_SD: Tensor,
    pre_RU: Tensor,
    x_SD: Tensor,
    weights_SK: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    order_R: Tensor,
    inverse_SK: Tensor,
    offsets_E: Tensor,
    activation: str,
    gated: bool,
    keep: bool,
    needs: list[bool],
    # no defaults: torch leaves arguments out that equal them, and torch 2.11 then looks for those that are written to
    gate_up_main: Tensor | None,
    down_main: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weights, gate_up and down; empty where ``needs`` is False.

    Those of gate_up and down are added to fp32 tensors instead, and empty, if these are given.
    """
    num_rows, choices = order_R.shape[0], inverse_SK.shape[1]
    source_R, dy_SD = order_R // max(choices, 1), dy_SD.contiguous()
    if not keep:
        pre_RU = gemm(x_SD, gate_up_EFD, offsets_E, index_R=source_R)
    options = MLPOptions(activation, gated)
    h_RF, dpre_RU, dweights_RP = _up_grad(dy_SD, pre_RU, weights_SK, down_EDF, order_R, offsets_E, options)
    del pre_RU
    dx_SD, dweights_SK, dgate_up_EFD, ddown_EDF = (x_SD.new_empty(0) for _ in range(4))
    if needs[1]:
        dweights_SK = weights_SK.new_zeros(weights_SK.shape)
        if num_rows:  # contiguous for any strides of the order, as the fake implementation promises
            dweights_SK = dweights_RP.sum(1)[inverse_SK.clamp(min=0)].masked_fill_(inverse_SK < 0, 0).contiguous()
    if needs[3]:
        grad_EDF = weight_grad(dy_SD, h_RF, offsets_E, dy_index_R=source_R, out=down_main)
        ddown_EDF = grad_EDF if down_main is None else ddown_EDF
    del h_RF
    if needs[2]:
        grad_EFD = weight_grad(dpre_RU, x_SD, offsets_E, index_R=source_R, out=gate_up_main)
        dgate_up_EFD = grad_EFD if gate_up_main is None else dgate_up_EFD
    if needs[0]:
        dx_SD = sum_rows(gemm(dpre_RU, gate_up_EFD, offsets_E, transposed=True), inverse_SK)
    return dx_SD, dweights_SK, dgate_up_EFD, ddown_EDF


@_backward.register_fake
def _(
    dy_SD, pre_RU, x_SD, weights_SK, gate_up_EFD, down_EDF, order_R, inverse_SK, offsets_E, act, gated, keep, needs,
    gate_up_main, down_main,
):  # fmt: skip
    inputs = (x_SD, weights_SK, gate_up_EFD, down_EDF)
    needs = [*needs[:2], needs[2] and gate_up_main is None, needs[3] and down_main is None]
    return tuple(t.new_empty(t.shape) if n else x_SD.new_empty(0) for t, n in zip(inputs, needs, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *inputs[:7])
    ctx.options, ctx.main_grads = inputs[7:10], inputs[10:]  # not saved: other micro-batches add to main_grads


def _autograd(ctx: Any, dy_SD: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy_SD is None:
        return (None,) * 12
    needs = list(ctx.needs_input_grad[:4])
    grads = _backward(dy_SD, *ctx.saved_tensors, *ctx.options, needs, *ctx.main_grads)
    added = (False, False, *(main_grad is not None for main_grad in ctx.main_grads))
    given = (g if n and not a else None for g, n, a in zip(grads, needs, added, strict=True))
    return *given, *(None,) * 8


_forward.register_autograd(_autograd, setup_context=_setup_context)


def expert_mlp(
    x_SD: Tensor,
    weights_SK: Tensor,
    order: ExpertOrder,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    options: MLPOptions,
    recompute: bool,
    main_grads: MainGrads,
) -> Tensor:
    inputs = (x_SD, weights_SK, gate_up_EFD, down_EDF)
    keep = not recompute and torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    return _forward(*inputs, *order, *options, keep, *main_grads)[0]
