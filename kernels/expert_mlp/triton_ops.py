"""The experts' SwiGLU in Triton: gathers in the loads, the activation in the epilogues, no host synchronisation.

Forward: gate and up of gathered rows in one tile, whose epilogue keeps the pre-activation and writes w * silu(gate)
* up; the down product; the sum over k. Backward: the product for dh, whose epilogue computes the activation again, its
gradient and the router weight's as <dh, h>, so that neither h nor the rows before the sum are kept; three grouped
products; the sum over k. Kept are x and the pre-activation alone: 2*S*D + 4*R*F bytes in 16 bits. The router
weight's gradient is one partial sum per column tile, added up in their order: no atomics.
"""

# S source rows, K choices per row, D hidden, F expert width, E experts, R = S*K routed rows, P column tiles.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import CompileCase, compile_case, launch_on, next_power_of_2
from ..grouped_gemm.triton_ops import (
    case,
    config_for,
    gemm,
    launch_options,
    locate,
    shipped,
    swizzle,
    tile_map,
    weight_grad,
)
from ..sort_by_expert import ExpertOrder


@triton.jit(do_not_specialize=["num_tiles"])
def _gated_kernel(
    x_ptr,
    flat_ptr,
    weights_ptr,
    gate_up_ptr,
    pre_ptr,
    h_ptr,
    tiles_ptr,
    num_tiles,
    choices,
    E,
    F,
    D,
    KEEP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """pre[R, 2F] = x[flat // choices] @ gate_up[e].T (if KEEP), h[R, F] = w * silu(gate) * up."""
    tile, column = swizzle(tl.program_id(0), num_tiles, tl.cdiv(F, BLOCK_N), GROUP)
    expert, row, stop = locate(tiles_ptr, tile, num_tiles)
    if (expert < 0) | (expert == E):
        return
    m = row + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # rows past the expert's last read its first: they are never stored, and loads without a mask are faster
    flat = tl.load(flat_ptr + tl.where(m < stop, m, row))
    a_ptrs = x_ptr + (flat // choices)[:, None] * D + k[None, :]
    gate_ptrs = gate_up_ptr + expert * 2 * F * D + n[None, :].to(tl.int64) * D + k[:, None]
    up_ptrs = gate_up_ptr + (expert * 2 + 1) * F * D + n[None, :].to(tl.int64) * D + k[:, None]
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, tl.cdiv(D, BLOCK_K)):
        there = n[None, :] < F
        if EVEN:
            a = tl.load(a_ptrs)
        else:
            left = D - step * BLOCK_K
            a = tl.load(a_ptrs, mask=k[None, :] < left, other=0.0)
            there = there & (k[:, None] < left)
        gate = tl.dot(a, tl.load(gate_ptrs, mask=there, other=0.0), gate, input_precision="ieee")
        up = tl.dot(a, tl.load(up_ptrs, mask=there, other=0.0), up, input_precision="ieee")
        a_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
    mask = (m[:, None] < stop) & (n[None, :] < F)
    if KEEP:
        pre_ptrs = pre_ptr + m[:, None] * 2 * F + n[None, :]
        tl.store(pre_ptrs, gate.to(pre_ptr.dtype.element_ty), mask=mask)
        tl.store(pre_ptrs + F, up.to(pre_ptr.dtype.element_ty), mask=mask)
    w = tl.load(weights_ptr + flat)
    h = gate * tl.sigmoid(gate) * up * w[:, None]
    tl.store(h_ptr + m[:, None] * F + n[None, :], h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tiles"])
def _gated_grad_kernel(
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
    choices,
    E,
    F,
    D,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dh = dy[flat // choices] @ down[e]; from it and pre: h[R, F] (weighted), dpre[R, 2F], dweights[R, P]."""
    columns = tl.cdiv(F, BLOCK_N)
    tile, column = swizzle(tl.program_id(0), num_tiles, columns, GROUP)
    expert, row, stop = locate(tiles_ptr, tile, num_tiles)
    if (expert < 0) | (expert == E):
        return
    m = row + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    flat = tl.load(flat_ptr + tl.where(m < stop, m, row))
    a_ptrs = dy_ptr + (flat // choices)[:, None] * D + k[None, :]
    b_ptrs = down_ptr + expert * D * F + k[:, None].to(tl.int64) * F + n[None, :]
    dh = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, tl.cdiv(D, BLOCK_K)):
        there = n[None, :] < F
        if EVEN:
            a = tl.load(a_ptrs)
        else:
            left = D - step * BLOCK_K
            a = tl.load(a_ptrs, mask=k[None, :] < left, other=0.0)
            there = there & (k[:, None] < left)
        dh = tl.dot(a, tl.load(b_ptrs, mask=there, other=0.0), dh, input_precision="ieee")
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * F
    mask = (m[:, None] < stop) & (n[None, :] < F)
    pre_at = m[:, None] * 2 * F + n[None, :]
    gate = tl.load(pre_ptr + pre_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(pre_ptr + pre_at + F, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(dweights_ptr + m * columns + column, tl.sum(dh * silu * up, 1), mask=m < stop)
    w = tl.load(weights_ptr + flat)[:, None]
    tl.store(h_ptr + m[:, None] * F + n[None, :], (silu * up * w).to(h_ptr.dtype.element_ty), mask=mask)
    dh *= w
    dgate = dh * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(dpre_ptr + pre_at, dgate.to(dpre_ptr.dtype.element_ty), mask=mask)
    tl.store(dpre_ptr + pre_at + F, (dh * silu).to(dpre_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_sources"])
def _sum_kernel(
    rows_ptr,
    inverse_ptr,
    out_ptr,
    num_sources,
    D,
    CHOICES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[s] = sum over k of rows[inverse[s, k]], in the order of k, in fp32; a negative inverse adds nothing."""
    s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for choice in range(CHOICES):
        row = tl.load(inverse_ptr + s * CHOICES + choice, mask=s < num_sources, other=-1)
        mask = (row[:, None] >= 0) & (d[None, :] < D)
        acc += tl.load(rows_ptr + row[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    mask = (s[:, None] < num_sources) & (d[None, :] < D)
    tl.store(out_ptr + s[:, None] * D + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


def _sum_rows(rows_RD: Tensor, inverse_SK: Tensor) -> Tensor:
    (sources, choices), hidden = inverse_SK.shape, rows_RD.shape[1]
    y_SD = torch.empty(sources, hidden, dtype=rows_RD.dtype, device=rows_RD.device)
    block_d = min(512, next_power_of_2(max(hidden, 1)))
    with launch_on(rows_RD):
        _sum_kernel[(-(-sources // 4), -(-hidden // block_d))](
            rows_RD, inverse_SK.contiguous(), y_SD, sources, hidden, choices, 4, block_d
        )
    return y_SD


@torch.library.custom_op("equimoe::expert_mlp", mutates_args=())
def _forward(
    x_SD: Tensor,
    weights_SK: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    order_R: Tensor,
    inverse_SK: Tensor,
    offsets_E: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The output [S, D] and, when asked to ``keep`` them, the pre-activations [R, 2F]."""
    experts, hidden, width = down_EDF.shape
    num_rows = order_R.shape[0]
    config = config_for("gated", x_SD, num_rows, experts)
    tiles_3T = tile_map(offsets_E, num_rows, config.m)
    pre_RF = x_SD.new_empty(num_rows if keep else 0, 2 * width)
    h_RF = x_SD.new_empty(num_rows, width)
    num_tiles = tiles_3T.shape[1]
    with launch_on(x_SD):
        _gated_kernel[(num_tiles * -(-width // config.n),)](
            x_SD.contiguous(),
            order_R,
            weights_SK.contiguous(),
            gate_up_EFD.contiguous(),
            pre_RF,
            h_RF,
            tiles_3T,
            num_tiles,
            inverse_SK.shape[1],
            experts,
            width,
            hidden,
            KEEP=keep,
            EVEN=hidden % config.k == 0,
            **launch_options(config),
        )
    return _sum_rows(gemm(h_RF, down_EDF, offsets_E), inverse_SK), pre_RF


@_forward.register_fake
def _(x_SD, weights_SK, gate_up_EFD, down_EDF, order_R, inverse_SK, offsets_E, keep):
    pre_RF = x_SD.new_empty(order_R.shape[0] if keep else 0, 2 * down_EDF.shape[2])
    return x_SD.new_empty(x_SD.shape), pre_RF


@torch.library.custom_op("equimoe::expert_mlp_backward", mutates_args=())
def _backward(
    dy_SD: Tensor,
    pre_RF: Tensor,
    x_SD: Tensor,
    weights_SK: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    order_R: Tensor,
    inverse_SK: Tensor,
    offsets_E: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weights, gate_up and down; empty where ``needs`` is False."""
    experts, hidden, width = down_EDF.shape
    num_rows, choices = order_R.shape[0], inverse_SK.shape[1]
    config = config_for("gated_grad", x_SD, num_rows, experts)
    tiles_3T = tile_map(offsets_E, num_rows, config.m)
    num_tiles, columns = tiles_3T.shape[1], -(-width // config.n)
    dy_SD = dy_SD.contiguous()
    h_RF, dpre_RF = pre_RF.new_empty(num_rows, width), torch.empty_like(pre_RF)
    dweights_RP = torch.empty(num_rows, columns, dtype=torch.float32, device=x_SD.device)
    with launch_on(x_SD):
        _gated_grad_kernel[(num_tiles * columns,)](
            dy_SD,
            order_R,
            weights_SK.contiguous(),
            down_EDF.contiguous(),
            pre_RF,
            h_RF,
            dpre_RF,
            dweights_RP,
            tiles_3T,
            num_tiles,
            choices,
            experts,
            width,
            hidden,
            EVEN=hidden % config.k == 0,
            **launch_options(config),
        )
    source_R = order_R // max(choices, 1)
    dx_SD, dweights_SK, dgate_up_EFD, ddown_EDF = (x_SD.new_empty(0) for _ in range(4))
    if needs[1]:
        dweights_SK = torch.zeros_like(weights_SK)
        if num_rows:
            dweights_SK = dweights_RP.sum(1)[inverse_SK.clamp(min=0)].masked_fill_(inverse_SK < 0, 0)
    if needs[3]:
        ddown_EDF = weight_grad(dy_SD, h_RF, offsets_E, dy_index_R=source_R)
    del h_RF
    if needs[2]:
        dgate_up_EFD = weight_grad(dpre_RF, x_SD, offsets_E, index_R=source_R)
    if needs[0]:
        dx_SD = _sum_rows(gemm(dpre_RF, gate_up_EFD, offsets_E, transposed=True), inverse_SK)
    return dx_SD, dweights_SK, dgate_up_EFD, ddown_EDF


@_backward.register_fake
def _(dy_SD, pre_RF, x_SD, weights_SK, gate_up_EFD, down_EDF, order_R, inverse_SK, offsets_E, needs):
    inputs = (x_SD, weights_SK, gate_up_EFD, down_EDF)
    return tuple(t.new_empty(t.shape) if n else x_SD.new_empty(0) for t, n in zip(inputs, needs, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *inputs[:7])


def _autograd(ctx: Any, dy_SD: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy_SD is None:
        return (None,) * 8
    needs = list(ctx.needs_input_grad[:4])
    grads = _backward(dy_SD, *ctx.saved_tensors, needs)
    return *(g if n else None for g, n in zip(grads, needs, strict=True)), None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def expert_mlp(x_SD: Tensor, weights_SK: Tensor, order: ExpertOrder, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    inputs = (x_SD, weights_SK, gate_up_EFD, down_EDF)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    return _forward(*inputs, *order, keep)[0]


def compile_cases() -> list[CompileCase]:
    """Every kernel in every shipped tile, for an ahead-of-time compiler. A label that begins with a chip is for it."""
    cases = []
    for dtype, label, config in shipped("gated"):
        types = f"*{dtype} *i64 *fp32 *{dtype} *{dtype} *{dtype} *i64 i32 i32 i32 i32 i32"
        cases.append(case(_gated_kernel, types, config, label, KEEP=True, EVEN=True))
    for dtype, label, config in shipped("gated_grad"):
        types = f"*{dtype} *i64 *fp32 *{dtype} *{dtype} *{dtype} *{dtype} *fp32 *i64 i32 i32 i32 i32 i32"
        cases.append(case(_gated_grad_kernel, types, config, label, EVEN=True))
    for dtype in ("fp32", "bf16", "fp16"):
        blocks = {"CHOICES": 8, "BLOCK_S": 4, "BLOCK_D": 512}
        cases.append(compile_case(_sum_kernel, f"*{dtype} *i64 *{dtype} i32 i32", blocks, f"sum {dtype}"))
    return cases
