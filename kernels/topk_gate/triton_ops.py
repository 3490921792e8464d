"""The gate in Triton: one pass over the logits in each direction, without atomics.

Each program processes a chunk of one sequence's tokens, a tile of a few tokens at a time, and writes the chunk's sums
to a workspace. A second kernel adds up the chunks in a fixed order, so results are reproducible bit for bit.
"""

# T tokens, N tokens of a sequence, E experts, K top-k, B sequences, C chunks, W = E + 1.
# In a tile: T tokens, G groups, J experts of a group, E = G * J columns, K choices, each padded to a power of two.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._ops import op
from .._triton import launch_on
from .tiles import (
    MAX_EXPERTS,
    MAX_K,
    REDUCE_CHUNKS,
    REDUCE_COLUMNS,
    backward_constants,
    forward_constants,
    forward_warps,
    tile_for,
)
from .types import LOW, GateOptions, GateOutput, least_sum, lowest_bias

_NONE = tl.constexpr(-(2**63))  # this and the next are below the key of every number
_TAKEN = tl.constexpr(-(2**63) + 1)
_LOW, _LEAST_SUM = tl.constexpr(LOW), tl.constexpr(least_sum())
_LOWEST_BIAS = tl.constexpr(lowest_bias(torch.float32))
_RUNTIME = ["length", "chunks", "scale"]  # so that a new number of tokens does not compile again


@triton.jit
def _tokens(mask, sequence, first, length, BT: tl.constexpr):
    """Return the rows of BT tokens of a sequence, whether each lies inside the sequence, and whether it counts."""
    n_T = first + tl.arange(0, BT)
    t_T, inside_T = sequence * length + n_T, n_T < length
    counted_T = inside_T
    if mask is not None:
        counted_T = inside_T & (tl.load(mask + t_T, mask=inside_T, other=0) != 0)
    return t_T, inside_T, counted_T


@triton.jit
def _keys(wanted_TE, column_E, valid_E):
    """Return int64 keys that sort by value (NaN is largest), then by column (lower is larger); _NONE if invalid."""
    bits = tl.where(wanted_TE == 0, 0.0, wanted_TE).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0
    bits = tl.where(wanted_TE != wanted_TE, 0x7FC00000, bits)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys_TE = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - column_E).to(tl.int64)[None, :]
    return tl.where(valid_E[None, :], keys_TE, _NONE)


@triton.jit
def _column_of(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _value_of(key):
    bits = (key >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _best_groups(
    keys_TE, GROUPS: tl.constexpr, KEPT: tl.constexpr, SIZE: tl.constexpr, BT: tl.constexpr, BG: tl.constexpr,
    BJ: tl.constexpr,
):  # fmt: skip
    """Replace the keys outside the KEPT best groups by _NONE."""
    keys_TGJ = tl.reshape(keys_TE, [BT, BG, BJ])
    first_TG = tl.max(keys_TGJ, 2)
    worth_TG = _value_of(first_TG)
    if SIZE > 1:
        worth_TG += _value_of(tl.max(tl.where(keys_TGJ == first_TG[:, :, None], _NONE, keys_TGJ), 2))
    group_G = tl.arange(0, BG)
    left_TG = _keys(worth_TG, group_G, group_G < GROUPS)
    for _ in range(KEPT):
        left_TG = tl.where(left_TG == tl.max(left_TG, 1)[:, None], _TAKEN, left_TG)
    return tl.reshape(tl.where((left_TG == _TAKEN)[:, :, None], keys_TGJ, _NONE), [BT, BG * BJ])


@triton.jit
def _lift(peak_T):
    """Return what to add to a token's logits if all are so low that sigmoid equals exp, so that no score underflows.

    It multiplies all scores of the token by the same factor.
    """
    return tl.where((peak_T < _LOW) & (peak_T > float("-inf")), _LOW - peak_T, 0.0)


@triton.jit
def _weigh(logits_TK, peak_T, total_T, valid_TK, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, AFTER: tl.constexpr):
    """Return the weights before normalisation [T, K], their sum, and whether that of the scores is very low.

    They are the scores, or exponentials of the logits: these if AFTER, or if NORMALIZE and the scores might underflow.
    """
    logits_TK = tl.where(valid_TK, logits_TK, float("-inf"))
    if AFTER:
        parts_TK = tl.exp(logits_TK - tl.max(logits_TK, 1)[:, None])
    elif SIGMOID:
        parts_TK = tl.sigmoid(logits_TK)
    else:
        parts_TK = tl.exp(logits_TK - peak_T[:, None]) / total_T[:, None]
    sum_T = tl.sum(parts_TK, 1)
    low_T = sum_T < _LEAST_SUM
    if NORMALIZE and not AFTER:
        parts_TK = tl.where(low_T[:, None], tl.exp(logits_TK - tl.max(logits_TK, 1)[:, None]), parts_TK)
        sum_T = tl.sum(parts_TK, 1)
    return parts_TK, sum_T, low_T


@triton.jit(do_not_specialize=_RUNTIME)
def gate_forward(
    logits, bias, mask, given, ids, weights, counts, sums, length, chunks, scale, E: tl.constexpr, K: tl.constexpr,
    GROUPS: tl.constexpr, KEPT: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, AFTER: tl.constexpr,
    CHUNK: tl.constexpr, BT: tl.constexpr, BG: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Process one chunk. Its sums go to row ``program`` of counts and sums, [B*C, W]; column E is for tokens and z."""
    SIZE: tl.constexpr = E // GROUPS
    program = tl.program_id(0).to(tl.int64)
    sequence = program // chunks
    first = (program - sequence * chunks) * CHUNK
    column_E, k_K = tl.arange(0, BG * BJ), tl.arange(0, BK)
    expert_E = column_E // BJ * SIZE + column_E % BJ
    valid_E = (column_E // BJ < GROUPS) & (column_E % BJ < SIZE)
    # narrow counters save registers in large tiles, which count 32 tokens; a given choice may name an expert K times
    narrow: tl.constexpr = tl.int32 if BT > 1 else (tl.int8 if given is None else tl.int16)
    counts_TE = tl.zeros([BT, BG * BJ], narrow)
    probs_TE = tl.zeros([BT, BG * BJ], tl.float32)
    tokens_T, z_T = tl.zeros([BT], tl.int32), tl.zeros([BT], tl.float32)
    for start in range(0, tl.minimum(length - first, CHUNK).to(tl.int32), BT):
        t_T, inside_T, counted_T = _tokens(mask, sequence, first + start, length, BT)
        x_TE = tl.load(logits + t_T[:, None] * E + expert_E, mask=inside_T[:, None] & valid_E[None, :], other=0.0)
        x_TE = tl.where(valid_E[None, :], x_TE.to(tl.float32), float("-inf"))
        peak_T = tl.max(x_TE, 1)
        scores_TE = tl.exp(x_TE - peak_T[:, None])
        total_T = tl.sum(scores_TE, 1)
        lse_T = peak_T + tl.log(total_T)
        if SIGMOID:
            lift_T = _lift(peak_T)
            scores_TE = tl.sigmoid(x_TE + lift_T[:, None])
            p_TE = scores_TE / tl.sum(scores_TE, 1)[:, None]
        else:
            scores_TE = scores_TE / total_T[:, None]
            p_TE = scores_TE
        probs_TE += tl.where(counted_T[:, None], p_TE, 0.0)
        if given is not None:
            chosen_TK = tl.load(given + t_T[:, None] * K + k_K, mask=inside_T[:, None] & (k_K < K)[None, :], other=0)
            chosen_TK = chosen_TK.to(tl.int32)
            for k in range(K):
                id_T = tl.sum(tl.where(k_K[None, :] == k, chosen_TK, 0), 1)
                counts_TE += ((expert_E[None, :] == id_T[:, None]) & valid_E[None, :] & counted_T[:, None]).to(narrow)
        else:
            wanted_TE = scores_TE
            if bias is not None:
                if SIGMOID:
                    wanted_TE *= tl.exp(-lift_T)[:, None]
                bias_E = tl.load(bias + expert_E, mask=valid_E, other=0.0).to(tl.float32)
                wanted_TE += tl.where(bias_E < _LOWEST_BIAS, _LOWEST_BIAS, bias_E)[None, :]
            keys_TE = _keys(wanted_TE, column_E, valid_E)
            if KEPT < GROUPS:
                keys_TE = _best_groups(keys_TE, GROUPS, KEPT, SIZE, BT, BG, BJ)
            chosen_TK = tl.zeros([BT, BK], tl.int32)
            for k in range(K):
                best_T = tl.max(keys_TE, 1)
                keys_TE = tl.where(keys_TE == best_T[:, None], _TAKEN, keys_TE)
                chosen_TK = tl.where(k_K[None, :] == k, _column_of(best_T)[:, None], chosen_TK)
            counts_TE += ((keys_TE == _TAKEN) & counted_T[:, None]).to(narrow)
            chosen_TK = chosen_TK // BJ * SIZE + chosen_TK % BJ
        valid_TK = inside_T[:, None] & (k_K < K)[None, :]
        logits_TK = tl.load(logits + t_T[:, None] * E + chosen_TK, mask=valid_TK, other=0.0).to(tl.float32)
        # tokens outside the sequence keep a choice, so that their rows are not divided by zero
        parts_TK, sum_T, _ = _weigh(logits_TK, peak_T, total_T, (k_K < K)[None, :], SIGMOID, NORMALIZE, AFTER)
        if NORMALIZE or AFTER:
            parts_TK = parts_TK / sum_T[:, None]
        tl.store(ids + t_T[:, None] * K + k_K, chosen_TK.to(tl.int64), mask=valid_TK)
        tl.store(weights + t_T[:, None] * K + k_K, parts_TK * scale, mask=valid_TK)
        tokens_T += counted_T.to(tl.int32)
        z_T += tl.where(counted_T, lse_T * lse_T, 0.0)
    row = program * (E + 1)
    tl.store(counts + row + expert_E, tl.sum(counts_TE.to(tl.int32), 0), mask=valid_E)
    tl.store(sums + row + expert_E, tl.sum(probs_TE, 0), mask=valid_E)
    tl.store(counts + row + E, tl.sum(tokens_T, 0))
    tl.store(sums + row + E, tl.sum(z_T, 0))


@triton.jit(do_not_specialize=["chunks"])
def gate_reduce(
    counts, sums, counts_BE, tokens_B, prob_sums_BE, z_B, chunks, E: tl.constexpr, BC: tl.constexpr, BW: tl.constexpr
):
    """Add up the chunks of a sequence for BW columns, always in the same order."""
    sequence = tl.program_id(0).to(tl.int64)
    column_W = tl.program_id(1) * BW + tl.arange(0, BW)
    counts_CW, sums_CW = tl.zeros([BC, BW], tl.int64), tl.zeros([BC, BW], tl.float32)
    for start in range(0, chunks, BC):
        chunk_C = start + tl.arange(0, BC)
        at_CW = (sequence * chunks + chunk_C)[:, None] * (E + 1) + column_W[None, :]
        inside_CW = (chunk_C < chunks)[:, None] & (column_W <= E)[None, :]
        counts_CW += tl.load(counts + at_CW, mask=inside_CW, other=0).to(tl.int64)
        sums_CW += tl.load(sums + at_CW, mask=inside_CW, other=0.0)
    counts_W, sums_W = tl.sum(counts_CW, 0), tl.sum(sums_CW, 0)
    tl.store(counts_BE + sequence * E + column_W, counts_W, mask=column_W < E)
    tl.store(prob_sums_BE + sequence * E + column_W, sums_W, mask=column_W < E)
    none_W = tl.zeros([BW], tl.int32)
    tl.store(tokens_B + sequence + none_W, counts_W, mask=column_W == E)
    tl.store(z_B + sequence + none_W, sums_W, mask=column_W == E)


@triton.jit(do_not_specialize=_RUNTIME)
def gate_backward(
    logits, mask, ids, dweights, dprob_sums, dz, dlogits, length, chunks, scale, E: tl.constexpr, K: tl.constexpr,
    SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, AFTER: tl.constexpr, CHUNK: tl.constexpr, BT: tl.constexpr,
    BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute the logits' gradient for one chunk, recomputing the scores."""
    program = tl.program_id(0).to(tl.int64)
    sequence = program // chunks
    first = (program - sequence * chunks) * CHUNK
    e_E, k_K = tl.arange(0, BE), tl.arange(0, BK)
    valid_E, valid_K = e_E < E, k_K < K
    dp_E = tl.load(dprob_sums + sequence * E + e_E, mask=valid_E, other=0.0)
    dz_one = tl.load(dz + sequence)
    for start in range(0, tl.minimum(length - first, CHUNK).to(tl.int32), BT):
        t_T, inside_T, counted_T = _tokens(mask, sequence, first + start, length, BT)
        inside_TE = inside_T[:, None] & valid_E[None, :]
        x_TE = tl.load(logits + t_T[:, None] * E + e_E, mask=inside_TE, other=0.0)
        x_TE = tl.where(valid_E[None, :], x_TE.to(tl.float32), float("-inf"))
        peak_T = tl.max(x_TE, 1)
        p_TE = tl.exp(x_TE - peak_T[:, None])
        total_T = tl.sum(p_TE, 1)
        p_TE = p_TE / total_T[:, None]

        inside_TK = inside_T[:, None] & valid_K[None, :]
        ids_TK = tl.load(ids + t_T[:, None] * K + k_K, mask=inside_TK, other=0).to(tl.int32)
        dw_TK = tl.load(dweights + t_T[:, None] * K + k_K, mask=inside_TK, other=0.0) * scale
        logits_TK = tl.load(logits + t_T[:, None] * E + ids_TK, mask=inside_TK, other=0.0).to(tl.float32)
        parts_TK, sum_T, low_T = _weigh(logits_TK, peak_T, total_T, valid_K[None, :], SIGMOID, NORMALIZE, AFTER)
        if NORMALIZE or AFTER:
            mean_T = tl.sum(dw_TK * parts_TK, 1) / sum_T
            dw_TK = (dw_TK - mean_T[:, None]) / sum_T[:, None]
            if AFTER:
                dw_TK *= parts_TK
            else:
                dw_TK = tl.where(low_T[:, None], dw_TK * parts_TK, dw_TK)
        dchosen_TE = tl.zeros([BT, BE], tl.float32)
        for k in range(K):
            id_T = tl.sum(tl.where(k_K[None, :] == k, ids_TK, 0), 1)
            d_T = tl.sum(tl.where(k_K[None, :] == k, dw_TK, 0.0), 1)
            dchosen_TE += tl.where(e_E[None, :] == id_T[:, None], d_T[:, None], 0.0)

        # dchosen is a gradient of scores, or of logits if the weights are exponentials of the logits
        from_scores_TE = dchosen_TE
        if NORMALIZE:
            from_scores_TE = tl.where(low_T[:, None], 0.0, dchosen_TE)
        dscores_TE = tl.where(counted_T[:, None], dp_E[None, :], 0.0)
        if SIGMOID:
            lift_T = _lift(peak_T)
            s_TE = tl.sigmoid(x_TE + lift_T[:, None])
            sum_T = tl.sum(s_TE, 1)
            mean_T = tl.sum(dscores_TE * s_TE, 1) / sum_T
            dscores_TE = tl.where(counted_T[:, None], (dscores_TE - mean_T[:, None]) / sum_T[:, None], 0.0)
            if not AFTER:
                dscores_TE += from_scores_TE * tl.exp(-lift_T)[:, None]
            dx_TE = dscores_TE * s_TE * (1.0 - s_TE)
        else:
            if not AFTER:
                dscores_TE += from_scores_TE
            dx_TE = p_TE * (dscores_TE - tl.sum(p_TE * dscores_TE, 1)[:, None])
        if AFTER:
            dx_TE += dchosen_TE
        elif NORMALIZE:
            dx_TE += tl.where(low_T[:, None], dchosen_TE, 0.0)
        dlse_T = tl.where(counted_T, 2.0 * dz_one * (peak_T + tl.log(total_T)), 0.0)
        dx_TE += dlse_T[:, None] * p_TE
        tl.store(dlogits + t_T[:, None] * E + e_E, dx_TE.to(dlogits.dtype.element_ty), mask=inside_TE)


_OPTIONS = "int k, str score, int groups, int kept_groups, bool normalize, bool after, float scale, SymInt sequences"


@op(
    "topk_gate",
    schema=f"(Tensor logits, Tensor? bias, Tensor? mask, Tensor? given, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _gate(
    logits: Tensor, bias: Tensor | None, mask: Tensor | None, given: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    options = GateOptions(*options)
    tokens, experts = logits.shape
    out = _fake_gate(logits, bias, mask, given, *options)
    weights, prob_sums_BE, z_B, ids, counts_BE, tokens_B = out
    constants = forward_constants(experts, options)
    length = tokens // options.sequences
    chunks = triton.cdiv(length, constants["CHUNK"])
    counts = torch.empty(options.sequences * chunks, experts + 1, dtype=torch.int32, device=logits.device)
    sums = torch.empty(options.sequences * chunks, experts + 1, dtype=torch.float32, device=logits.device)
    bytes_T = None if mask is None else mask.contiguous().view(torch.uint8)
    with launch_on(logits):
        if tokens:
            gate_forward[(options.sequences * chunks,)](
                logits.contiguous(), None if bias is None else bias.contiguous(), bytes_T,
                None if given is None else given.contiguous(), ids, weights, counts, sums,
                length, chunks, options.scale, **constants,
                num_warps=forward_warps(constants, given is not None),
            )  # fmt: skip
        gate_reduce[(options.sequences, triton.cdiv(experts + 1, REDUCE_COLUMNS))](
            counts, sums, counts_BE, tokens_B, prob_sums_BE, z_B, chunks,
            E=experts, BC=REDUCE_CHUNKS, BW=REDUCE_COLUMNS,
        )  # fmt: skip
    return out


@_gate.register_fake
def _fake_gate(
    logits: Tensor, bias: Tensor | None, mask: Tensor | None, given: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    options = GateOptions(*options)
    tokens, experts = logits.shape

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    return (
        empty(torch.float32, tokens, options.k),
        empty(torch.float32, options.sequences, experts),
        empty(torch.float32, options.sequences),
        empty(torch.int64, tokens, options.k),
        empty(torch.int64, options.sequences, experts),
        empty(torch.int64, options.sequences),
    )


@op(
    "topk_gate_backward",
    schema=f"(Tensor logits, Tensor? mask, Tensor ids, Tensor dweights, Tensor dprob_sums, Tensor dz, {_OPTIONS})"
    " -> Tensor",
)
def _gate_backward(
    logits: Tensor, mask: Tensor | None, ids: Tensor, dweights: Tensor, dprob_sums: Tensor, dz: Tensor, *options: Any
) -> Tensor:
    options = GateOptions(*options)
    tokens, experts = logits.shape
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if not tokens:
        return dlogits
    constants = backward_constants(experts, options)
    length = tokens // options.sequences
    chunks = triton.cdiv(length, constants["CHUNK"])
    bytes_T = None if mask is None else mask.contiguous().view(torch.uint8)
    with launch_on(logits):
        gate_backward[(options.sequences * chunks,)](
            logits.contiguous(), bytes_T, ids.contiguous(), dweights.contiguous(), dprob_sums.contiguous(),
            dz.contiguous(), dlogits, length, chunks, options.scale, **constants,
            num_warps=tile_for(constants["BE"]).warps,
        )  # fmt: skip
    return dlogits


@_gate_backward.register_fake
def _fake_gate_backward(logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, mask, _, *ctx.options = inputs
    ctx.save_for_backward(logits, mask, output[3])
    ctx.mark_non_differentiable(*output[3:])


def _differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    logits, mask, ids = ctx.saved_tensors
    dlogits = _gate_backward(logits, mask, ids, *grads[:3], *ctx.options)
    return dlogits, None, None, None, *(None for _ in ctx.options)


_gate.register_autograd(_differentiate, setup_context=_save)


def topk_gate(
    logits_TE: Tensor, bias_E: Tensor | None, mask_T: Tensor | None, ids_TK: Tensor | None, options: GateOptions
) -> GateOutput:
    """Run the Triton backend. Raises ValueError beyond its limits, and for CPU tensors unless Triton interprets."""
    if logits_TE.dtype == torch.float64:
        raise ValueError("logits_TE=torch.float64: the triton backend computes in fp32; use backend='torch'")
    if logits_TE.shape[1] > MAX_EXPERTS or options.k > MAX_K:
        given = f"{logits_TE.shape[1]} experts, k={options.k}"
        raise ValueError(f"{given}: the triton backend takes at most {MAX_EXPERTS} and {MAX_K}; use backend='torch'")
    if ids_TK is not None:
        bias_E, options = None, options._replace(groups=1, kept_groups=1)
    bias_E = None if bias_E is None else bias_E.detach()
    weights_TK, prob_sums_BE, z_B, ids_TK, counts_BE, tokens_B = _gate(logits_TE, bias_E, mask_T, ids_TK, *options)
    return GateOutput(ids_TK, weights_TK, counts_BE, tokens_B, prob_sums_BE, z_B.sum())
