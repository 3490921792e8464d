"""A stable counting sort in four launches: ranks within blocks, prefix sums over blocks and over experts, positions.

There are no atomics: a row's position is a sum of counts, so the result equals that of any stable sort.
"""

# S source rows, K choices per row, R = S*K routed rows, E experts, X blocks of rows, W = E + 1 bins (the last is for
# dropped rows). In a tile: I rows of a block are compared with J rows of the same block.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._ops import op
from .._triton import launch_on
from .types import ExpertOrder


@triton.jit
def _bins(ids, row, rows, experts):
    """Return the bin of each row: its expert; ``experts`` for a dropped row; -1 past the end."""
    id = tl.load(ids + row, mask=row < rows, other=-1)
    bins = tl.where((id >= 0) & (id < experts), id, experts).to(tl.int32)
    return tl.where(row < rows, bins, -1)


@triton.jit(do_not_specialize=["rows", "experts"])
def sort_rank(ids, ranks, counts, rows, experts, BLOCK: tl.constexpr, BJ: tl.constexpr):
    """Compute each row's rank within its block and bin, and the counts per block and bin, [X, W] (initially zero)."""
    block = tl.program_id(0).to(tl.int64)
    i_I = tl.arange(0, BLOCK)
    row_I = block * BLOCK + i_I
    bin_I = _bins(ids, row_I, rows, experts)
    before_I, all_I = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, BLOCK, BJ):
        j_J = start + tl.arange(0, BJ)
        same_IJ = bin_I[:, None] == _bins(ids, block * BLOCK + j_J, rows, experts)[None, :]
        all_I += tl.sum(same_IJ.to(tl.int32), 1)
        before_I += tl.sum((same_IJ & (j_J[None, :] < i_I[:, None])).to(tl.int32), 1)
    tl.store(ranks + row_I, before_I, mask=row_I < rows)
    last_I = (before_I == all_I - 1) & (row_I < rows)  # the last row of each bin writes the count
    tl.store(counts + block * (experts + 1) + bin_I, all_I, mask=last_I)


@triton.jit(do_not_specialize=["blocks", "bins"])
def sort_prefix_blocks(counts, totals, blocks, bins, BX: tl.constexpr, BW: tl.constexpr):
    """Replace each block's counts by the sums over all earlier blocks, in place, and write the totals per bin, [W]."""
    bin_W = tl.program_id(0) * BW + tl.arange(0, BW)
    carry_W = tl.zeros([BW], tl.int64)
    for start in range(0, blocks, BX):
        block_X = start + tl.arange(0, BX).to(tl.int64)
        at_XW = block_X[:, None] * bins + bin_W[None, :]
        inside_XW = (block_X < blocks)[:, None] & (bin_W < bins)[None, :]
        counts_XW = tl.load(counts + at_XW, mask=inside_XW, other=0)
        before_XW = carry_W[None, :] + tl.cumsum(counts_XW, 0) - counts_XW
        tl.store(counts + at_XW, before_XW, mask=inside_XW)
        carry_W += tl.sum(counts_XW, 0)
    tl.store(totals + bin_W, carry_W, mask=bin_W < bins)


@triton.jit(do_not_specialize=["bins"])
def sort_prefix_experts(totals, offsets, bins, BW: tl.constexpr):
    """Write the sum of totals over all earlier bins, [W]. Runs as one program."""
    carry = tl.zeros([1], tl.int64)
    for start in range(0, bins, BW):
        bin_W = start + tl.arange(0, BW)
        totals_W = tl.load(totals + bin_W, mask=bin_W < bins, other=0)
        tl.store(offsets + bin_W, carry + tl.cumsum(totals_W, 0) - totals_W, mask=bin_W < bins)
        carry += tl.sum(totals_W, 0)


@triton.jit(do_not_specialize=["rows", "experts"])
def sort_place(ids, ranks, before, offsets, order, inverse, rows, experts, BLOCK: tl.constexpr):
    """Compute each row's position: the rows of earlier bins, of earlier blocks, and its rank within the block."""
    block = tl.program_id(0).to(tl.int64)
    row_I = block * BLOCK + tl.arange(0, BLOCK)
    inside_I = row_I < rows
    bin_I = _bins(ids, row_I, rows, experts)
    position_I = tl.load(offsets + bin_I, mask=inside_I, other=0)
    position_I += tl.load(before + block * (experts + 1) + bin_I, mask=inside_I, other=0)
    position_I += tl.load(ranks + row_I, mask=inside_I, other=0)
    tl.store(order + position_I, row_I, mask=inside_I)
    tl.store(inverse + row_I, tl.where(bin_I == experts, -1, position_I), mask=inside_I)


class Tile(NamedTuple):
    """How rows are divided into blocks."""

    #: rows of a block, and how many of them each row is compared with at a time
    block: int
    others: int
    warps: int


#: by the largest number of experts; with many experts blocks are larger, because each block writes W counts
TILES = {512: Tile(512, 16, 8), 1 << 62: Tile(1024, 8, 8)}
_PREFIX_BLOCKS, _PREFIX_BINS, _PREFIX_ALL = 256, 8, 1024


def tile_for(experts: int) -> Tile:
    """Return the tile for a number of experts. It does not depend on the number of rows, which varies."""
    return next(tile for largest, tile in TILES.items() if experts <= largest)


@op("sort_by_expert", schema="(Tensor ids, int experts) -> (Tensor, Tensor, Tensor)")
def _sort(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, tile = ids.numel(), tile_for(experts)
    blocks, bins = triton.cdiv(rows, tile.block), experts + 1
    order, inverse, offsets = _fake_sort(ids, experts)
    if not rows:
        return order, inverse, offsets.zero_()
    ids = ids.contiguous()
    ranks = torch.empty(rows, dtype=torch.int32, device=ids.device)
    counts = torch.zeros(blocks, bins, dtype=torch.int64, device=ids.device)
    totals = torch.empty(bins, dtype=torch.int64, device=ids.device)
    with launch_on(ids):
        sort_rank[(blocks,)](ids, ranks, counts, rows, experts, BLOCK=tile.block, BJ=tile.others, num_warps=tile.warps)
        sort_prefix_blocks[(triton.cdiv(bins, _PREFIX_BINS),)](
            counts, totals, blocks, bins, BX=_PREFIX_BLOCKS, BW=_PREFIX_BINS
        )
        sort_prefix_experts[(1,)](totals, offsets, bins, BW=_PREFIX_ALL)
        sort_place[(blocks,)](
            ids, ranks, counts, offsets, order, inverse, rows, experts, BLOCK=tile.block, num_warps=tile.warps
        )
    return order, inverse, offsets


@_sort.register_fake
def _fake_sort(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=ids.device)

    return empty(ids.numel()), empty(*ids.shape), empty(experts + 1)


def sort_by_expert(ids_SK: Tensor, num_experts: int) -> ExpertOrder:
    return ExpertOrder(*_sort(ids_SK, num_experts))
