"""Triton kernels for products of rows sorted by expert. The counts per expert stay on the device.

A small kernel maps row tiles to experts. As many tiles are launched as there can be at most, and superfluous ones
return at once. All rows of a tile belong to one expert. The rows of no expert form one more group, whose result is
zero. There are no atomics, so results are reproducible bit for bit.

Kernels expect contiguous rows and weights; the functions that launch them make copies if necessary. Offsets and indices
are clamped to their valid ranges, so that invalid ones give wrong results but never access memory outside the tensors.
"""

# R rows sorted by expert, E experts, K in width, N out width, T row tiles.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._ops import op
from .._triton import launch_on, next_power_of_2
from ..matmul_tiles import MatmulTile, arch_of, shipped_tile

_MAP_BLOCK = 16


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def clamp(value, stop):
    """Clamp ``value`` to [0, stop)."""
    return tl.minimum(tl.maximum(value, 0), stop - 1)


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def _tile_map_kernel(
    offsets_ptr, tiles_ptr, num_rows, num_tiles, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr
):
    e = tl.arange(0, BLOCK_E)
    # even for invalid offsets the groups cover 0..num_rows: each row is in one tile, and no tile has a row outside
    start_E = tl.load(offsets_ptr + e, mask=(e > 0) & (e <= E), other=0)
    stop_E = tl.load(offsets_ptr + e + 1, mask=e < E, other=num_rows)
    start_E = tl.associative_scan(clamp(start_E, num_rows + 1), 0, _maximum)
    stop_E = tl.associative_scan(clamp(stop_E, num_rows + 1), 0, _maximum)
    start_E = tl.where(e <= E, start_E, num_rows)
    count_E = ((stop_E - start_E + BLOCK_M - 1) // BLOCK_M).to(tl.int32)
    end_E = tl.cumsum(count_E, 0)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    before_TE = end_E[None, :] <= t[:, None]
    expert_T = tl.sum(before_TE.to(tl.int32), 1)
    first_T = tl.sum(tl.where(before_TE, count_E[None, :], 0), 1)
    mine_TE = e[None, :] == expert_T[:, None]
    row_T = tl.sum(tl.where(mine_TE, start_E[None, :], 0), 1) + (t - first_T).to(tl.int64) * BLOCK_M
    stop_T = tl.sum(tl.where(mine_TE, stop_E[None, :], 0), 1)
    inside_T = t < num_tiles
    tl.store(tiles_ptr + t, tl.where(expert_T <= E, expert_T, -1).to(tl.int64), mask=inside_T)
    tl.store(tiles_ptr + num_tiles + t, row_T, mask=inside_T)
    tl.store(tiles_ptr + 2 * num_tiles + t, stop_T, mask=inside_T)


@triton.jit
def swizzle(pid, num_tiles, num_columns, GROUP: tl.constexpr):
    """Return (row tile, column tile) so that groups of GROUP row tiles share the columns that they read."""
    in_group = GROUP * num_columns
    first = pid // in_group * GROUP
    size = min(num_tiles - first, GROUP)
    return first + pid % in_group % size, pid % in_group // size


@triton.jit
def locate(tiles_ptr, num_tiles, num_columns, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):
    """Return this program's (expert, column tile, rows, rows to load, end of the expert's rows).

    The expert is -1 for a superfluous tile, and E for the rows of no expert. In place of rows past the expert's end,
    the tile's first row is loaded: the results are never stored, and loads without a mask are faster.
    """
    tile, column = swizzle(tl.program_id(0), num_tiles, num_columns, GROUP)
    expert, first = tl.load(tiles_ptr + tile), tl.load(tiles_ptr + num_tiles + tile)
    stop = tl.load(tiles_ptr + 2 * num_tiles + tile)
    m = first + tl.arange(0, BLOCK_M)
    return expert, column, m, tl.where(m < stop, m, first), stop


@triton.jit
def weight_tile(weight_ptr, first, n, k, N, K, TRANSPOSED: tl.constexpr):
    """Return pointers [k, n] into a weight at element ``first``: [N, K], or [K, N] if TRANSPOSED."""
    at = k[:, None].to(tl.int64) * N + n[None, :] if TRANSPOSED else n[None, :].to(tl.int64) * K + k[:, None]
    return weight_ptr + first + at


@triton.jit
def load_rows(ptrs, k, left, EVEN: tl.constexpr):
    """Load a tile [m, k] of which only the first ``left`` columns exist."""
    return tl.load(ptrs) if EVEN else tl.load(ptrs, mask=k[None, :] < left, other=0.0)


@triton.jit
def load_weight(ptrs, n, N, k, left, EVEN: tl.constexpr):
    """Load a tile [k, n] of a weight with N columns, of which only the first ``left`` rows exist."""
    inside = n[None, :] < N
    return tl.load(ptrs, mask=inside if EVEN else inside & (k[:, None] < left), other=0.0)


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the left and the right half of a tile's columns. What follows a product needs fewer registers for each."""
    return tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit(do_not_specialize=["num_tiles", "sources"])
def _gemm_kernel(
    rows_ptr,
    index_ptr,
    weight_ptr,
    out_ptr,
    tiles_ptr,
    num_tiles,
    sources,
    E,
    N,
    K,
    TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[R, N] = rows[R, K] @ weight[e].T for weights [N, K], or rows @ weight[e] for [K, N] if TRANSPOSED."""
    expert, column, m, source, stop = locate(tiles_ptr, num_tiles, tl.cdiv(N, BLOCK_N), BLOCK_M, GROUP)
    if expert < 0:
        return
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    if index_ptr is not None:
        source = clamp(tl.load(index_ptr + source), sources)
    a_ptrs = rows_ptr + source[:, None] * K + k[None, :]
    b_ptrs = weight_tile(weight_ptr, expert * N * K, n, k, N, K, TRANSPOSED)
    b_step = tl.cast(BLOCK_K, tl.int64)
    if TRANSPOSED:
        b_step *= N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    steps = tl.cdiv(K, BLOCK_K)
    if expert == E:
        steps = 0
    for step in range(0, steps):
        left = K - step * BLOCK_K
        a = load_rows(a_ptrs, k, left, EVEN_K)
        acc = tl.dot(a, load_weight(b_ptrs, n, N, k, left, EVEN_K), acc, input_precision=PRECISION)
        a_ptrs += BLOCK_K
        b_ptrs += b_step
    out_ptrs = out_ptr + m[:, None] * N + n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(m[:, None] < stop) & (n[None, :] < N))


@triton.jit
def _store_wgrad(acc, out_ptr, n, first, N, K, ACCUMULATE: tl.constexpr, COLUMNS: tl.constexpr):
    """Store columns of an expert's gradient [N, K] from ``first`` on, or add them to what is there."""
    k = first + tl.arange(0, COLUMNS)
    out_ptrs = out_ptr + n[:, None].to(tl.int64) * K + k[None, :]
    mask = (n[:, None] < N) & (k[None, :] < K)
    if ACCUMULATE:
        acc += tl.load(out_ptrs, mask=mask, other=0.0)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rows_at(index_ptr, r, stop, sources):
    """Return the source rows of sorted rows ``r`` below ``stop``; without an index, ``r`` itself."""
    if index_ptr is not None:
        r = clamp(tl.load(index_ptr + r, mask=r < stop, other=0), sources)
    return r


@triton.jit(do_not_specialize=["num_rows", "num_dy", "sources"])
def _wgrad_kernel(
    dy_ptr,
    dy_index_ptr,
    rows_ptr,
    index_ptr,
    out_ptr,
    offsets_ptr,
    num_rows,
    num_dy,
    sources,
    N,
    K,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[e] = dy[rows of e].T @ rows[rows of e], in tiles of BLOCK_M x BLOCK_N, BLOCK_K rows at a time.

    The index of a step's rows is loaded one step earlier. If a step loaded both, the compiler would wait for the index
    in every step, and copy only one step ahead, whatever the number of stages.
    """
    tiles_n, tiles_k = tl.cdiv(N, BLOCK_M), tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    expert = pid // (tiles_n * tiles_k)
    tile_n, tile_k = swizzle(pid % (tiles_n * tiles_k), tiles_n, tiles_k, GROUP)
    start = clamp(tl.load(offsets_ptr + expert), num_rows + 1)
    stop = clamp(tl.load(offsets_ptr + expert + 1), num_rows + 1)
    n = tile_n * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile_k * BLOCK_N + tl.arange(0, BLOCK_N)
    r = start + tl.arange(0, BLOCK_K)
    a_row, b_row = _rows_at(dy_index_ptr, r, stop, num_dy), _rows_at(index_ptr, r, stop, sources)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, tl.cdiv(stop - start, BLOCK_K).to(tl.int32)):
        # mask both sides: another expert's row may hold NaN, and 0 * NaN is NaN
        valid = (r < stop)[:, None]
        a = tl.load(dy_ptr + a_row[:, None] * N + n[None, :], mask=valid & (n[None, :] < N), other=0.0)
        b = tl.load(rows_ptr + b_row[:, None] * K + k[None, :], mask=valid & (k[None, :] < K), other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
        r += BLOCK_K
        a_row, b_row = _rows_at(dy_index_ptr, r, stop, num_dy), _rows_at(index_ptr, r, stop, sources)
    out_ptr += expert.to(tl.int64) * N * K
    first = tile_k * BLOCK_N
    if BLOCK_N > 128:
        one, two = halves(acc, BLOCK_M, BLOCK_N)
        half: tl.constexpr = BLOCK_N // 2
        _store_wgrad(one, out_ptr, n, first, N, K, ACCUMULATE, half)
        _store_wgrad(two, out_ptr, n, first + half, N, K, ACCUMULATE, half)
    else:
        _store_wgrad(acc, out_ptr, n, first, N, K, ACCUMULATE, BLOCK_N)


def precision(dtype: torch.dtype) -> str:
    """Return the precision of products of fp32 tiles, as torch is set. It has no effect on other dtypes."""
    # most of AMD's chips have no TF32
    allowed = dtype == torch.float32 and torch.version.hip is None
    return "tf32" if allowed and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def launch_options(tile: MatmulTile, precision: str = "ieee") -> dict[str, Any]:
    """Return the keyword arguments that tell a kernel its tile."""
    return {
        "PRECISION": precision,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "GROUP": tile.group,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def tile_for(op: str, rows: Tensor, num_rows: int, num_experts: int, *operands: Tensor | int) -> MatmulTile:
    """Return the tile of ``op`` for ``rows`` and the other ``operands`` (tensors and widths).

    Raises ValueError for rows of a dtype that the kernels do not support.
    """
    if rows.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype={rows.dtype}: backend='triton' has fp32, bf16 and fp16; use backend='torch'")
    # Triton looks at the same alignment when it chooses between wide loads and loads of single elements
    aligned = all((one if isinstance(one, int) else one.data_ptr()) % 16 == 0 for one in (rows, *operands))
    return shipped_tile(op, arch_of(rows.device), rows.dtype, num_rows // max(num_experts, 1), aligned)


def tile_map(offsets_E: Tensor, num_rows: int, block: int) -> Tensor:
    """Return expert, first row and end of rows of each row tile: int64 [3, T] with T = ceil(R / block) + E."""
    experts = offsets_E.shape[0] - 1
    num_tiles, block_e = -(-num_rows // block) + experts, next_power_of_2(experts + 1)
    tiles_3T = torch.empty(3, num_tiles, dtype=torch.int64, device=offsets_E.device)
    with launch_on(offsets_E):
        _tile_map_kernel[(-(-num_tiles // _MAP_BLOCK),)](
            offsets_E.contiguous(), tiles_3T, num_rows, num_tiles, experts, block, block_e, _MAP_BLOCK
        )
    return tiles_3T


def gemm(
    rows: Tensor, weight_EAB: Tensor, offsets_E: Tensor, index_R: Tensor | None = None, transposed: bool = False
) -> Tensor:
    """Return [R, A] rows @ weight[e].T, or [R, B] rows @ weight[e] if ``transposed``; zero for rows of no expert."""
    experts, width_n, width_k = weight_EAB.shape
    if transposed:
        width_n, width_k = width_k, width_n
    num_rows = (rows if index_R is None else index_R).shape[0]
    tile = tile_for("gemm", rows, num_rows, experts, weight_EAB, width_n, width_k)
    tiles_3T = tile_map(offsets_E, num_rows, tile.m)
    out_RN = torch.empty(num_rows, width_n, dtype=rows.dtype, device=rows.device)
    num_tiles = tiles_3T.shape[1]
    with launch_on(rows):
        _gemm_kernel[(num_tiles * -(-width_n // tile.n),)](
            rows.contiguous(),
            None if index_R is None else index_R.contiguous(),
            weight_EAB.contiguous(),
            out_RN,
            tiles_3T,
            num_tiles,
            rows.shape[0],
            experts,
            width_n,
            width_k,
            TRANSPOSED=transposed,
            EVEN_K=width_k % tile.k == 0,
            **launch_options(tile, precision(rows.dtype)),
        )
    return out_RN


def weight_grad(
    dy: Tensor,
    rows: Tensor,
    offsets_E: Tensor,
    dy_index_R: Tensor | None = None,
    index_R: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return [E, N, K] dy.T @ rows by expert, in dy's dtype; added to the fp32 ``out`` if it is given."""
    experts, width_n, width_k = offsets_E.shape[0] - 1, dy.shape[1], rows.shape[1]
    num_rows = (rows if index_R is None else index_R).shape[0]
    tile = tile_for("wgrad", rows, num_rows, experts, dy, width_n, width_k)
    grad_ENK = out
    if grad_ENK is None:
        grad_ENK = torch.empty(experts, width_n, width_k, dtype=dy.dtype, device=dy.device)
    with launch_on(dy):
        _wgrad_kernel[(experts * -(-width_n // tile.m) * -(-width_k // tile.n),)](
            dy.contiguous(),
            None if dy_index_R is None else dy_index_R.contiguous(),
            rows.contiguous(),
            None if index_R is None else index_R.contiguous(),
            grad_ENK,
            offsets_E.contiguous(),
            num_rows,
            dy.shape[0],
            rows.shape[0],
            width_n,
            width_k,
            ACCUMULATE=out is not None,
            **launch_options(tile, precision(rows.dtype)),
        )
    return grad_ENK


@op("grouped_gemm")
def forward(rows: Tensor, weight_ENK: Tensor, offsets_E: Tensor, index_R: Tensor | None) -> Tensor:
    return gemm(rows, weight_ENK, offsets_E, index_R)


@op("grouped_gemm_dgrad")
def dgrad(dy_RN: Tensor, weight_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    return gemm(dy_RN, weight_ENK, offsets_E, transposed=True)


@op("grouped_gemm_wgrad")
def _wgrad(dy: Tensor, rows: Tensor, offsets_E: Tensor, dy_index_R: Tensor | None, index_R: Tensor | None) -> Tensor:
    return weight_grad(dy, rows, offsets_E, dy_index_R, index_R)


@op("grouped_gemm_wgrad_", mutates_args=("out",))
def _wgrad_(
    dy: Tensor, rows: Tensor, offsets_E: Tensor, dy_index_R: Tensor | None, index_R: Tensor | None, out: Tensor
) -> None:
    weight_grad(dy, rows, offsets_E, dy_index_R, index_R, out)


def wgrad(
    dy: Tensor, rows: Tensor, offsets_E: Tensor, dy_index_R: Tensor | None, index_R: Tensor | None, out: Tensor | None
) -> Tensor:
    if out is None:
        return _wgrad(dy, rows, offsets_E, dy_index_R, index_R)
    _wgrad_(dy, rows, offsets_E, dy_index_R, index_R, out)
    return out


@forward.register_fake
def _(rows: Tensor, weight_ENK: Tensor, offsets_E: Tensor, index_R: Tensor | None) -> Tensor:
    return rows.new_empty((rows if index_R is None else index_R).shape[0], weight_ENK.shape[1])


@dgrad.register_fake
def _(dy_RN: Tensor, weight_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    return dy_RN.new_empty(dy_RN.shape[0], weight_ENK.shape[2])


@_wgrad.register_fake
def _(dy: Tensor, rows: Tensor, offsets_E: Tensor, dy_index_R: Tensor | None, index_R: Tensor | None) -> Tensor:
    return dy.new_empty(offsets_E.shape[0] - 1, dy.shape[1], rows.shape[1])
