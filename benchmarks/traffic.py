"""What the Triton kernels move, counted launch by launch from their loads and stores.

Beside the floor of ``cost.py`` this says where an implementation moves more than it must: indices of 64 bits, tensors
written by one launch and read by the next, weights read again for every tile of rows.
"""

# T tokens, D hidden, F expert width, E experts, K top-k, R = T*K routed rows, W = E + 1 offsets.

from __future__ import annotations

from typing import NamedTuple

import torch
from shapes import Shape

from equimoe.kernels.matmul_tiles import MatmulTile, shipped_tile
from equimoe.kernels.topk_gate.tiles import forward_constants
from equimoe.kernels.topk_gate.types import GateOptions

#: rows of a block in the counting sort, by the largest number of experts
_SORT_BLOCKS = {512: 512, 1 << 62: 1024}
_INDEX = 8
_FLOAT = 4
#: the torch operations around the launches
TORCH = "torch"


class Launch(NamedTuple):
    """Bytes of one launch: of its operands, each once; of those it both reads and writes; what its tiles ask for."""

    kernel: str
    operands: int
    again: int = 0
    #: loads and stores as the tiles issue them, most of them answered by the L2 cache; 0: as the operands
    tiles: int = 0

    @property
    def bytes(self) -> int:
        return self.operands + self.again

    @property
    def issued(self) -> int:
        return max(self.tiles, self.bytes)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


class _Plan:
    """One shape in one dtype on one chip."""

    def __init__(self, shape: Shape, arch: str, dtype: torch.dtype) -> None:
        self.s, self.arch, self.dtype = shape, arch, dtype
        self.size = dtype.itemsize
        self.R, self.offsets = shape.rows, _INDEX * (shape.E + 1)

    def config(self, op: str) -> MatmulTile:
        aligned = self.s.D % 16 == self.s.F % 16 == 0
        return shipped_tile(op, self.arch, self.dtype, self.R // self.s.E, aligned)

    def num_tiles(self, config: MatmulTile) -> int:
        return _ceil(self.R, config.m) + self.s.E

    def tile_map(self, config: MatmulTile) -> Launch:
        return Launch("_tile_map_kernel", self.offsets + 3 * _INDEX * self.num_tiles(config))

    def tiled(
        self, kernel: str, config: MatmulTile, operands: int, columns: int, depth: int, width: int
    ) -> list[Launch]:
        """A product in row tiles: each reads ``config.m`` rows and ``width`` columns of weights, ``depth`` deep."""
        row_tiles = self.s.E * _ceil(_ceil(self.R, self.s.E), config.m)
        loads = row_tiles * columns * depth * (config.m + width) * self.size
        tiles = 3 * _INDEX * self.num_tiles(config)
        return [self.tile_map(config), Launch(kernel, operands + tiles, tiles=loads)]

    def gemm(self, in_rows: int, depth: int, out: int, indexed: bool = False) -> list[Launch]:
        config = self.config("gemm")
        elements = in_rows * depth + self.s.E * depth * out + self.R * out
        operands = self.size * elements + _INDEX * self.R * indexed
        return self.tiled("_gemm_kernel", config, operands, _ceil(out, config.n), depth, config.n)

    def wgrad(self, left_rows: int, left: int, right_rows: int, right: int, indices: int = 0) -> list[Launch]:
        config = self.config("wgrad")
        elements = left_rows * left + right_rows * right + self.s.E * left * right
        operands = self.size * elements + _INDEX * self.R * indices + self.offsets
        blocks = _ceil(left, config.m) * _ceil(right, config.n)
        return [Launch("_wgrad_kernel", operands, tiles=blocks * self.R * (config.m + config.n) * self.size)]

    def sum(self) -> Launch:
        return Launch("combine_rows", self.size * (self.R + self.s.T) * self.s.D + _INDEX * self.R)

    def gate(self) -> tuple[list[Launch], list[Launch]]:
        s = self.s
        options = GateOptions(s.K, "softmax", 1, 1, True, False, 1.0, 1)
        sums = _ceil(s.T, int(forward_constants(s.E, options)["CHUNK"])) * (s.E + 1) * 8
        logits, choices = _FLOAT * s.T * s.E, (_INDEX + _FLOAT) * self.R
        ends = (_INDEX + _FLOAT) * s.E
        forward = [
            Launch("gate_forward", logits + choices + sums),
            Launch("gate_reduce", sums + ends + _INDEX + _FLOAT),
        ]
        return forward, [Launch("gate_backward", 2 * logits + choices + _FLOAT * s.E + _FLOAT)]

    def sort(self) -> list[Launch]:
        block = next(rows for most, rows in _SORT_BLOCKS.items() if most >= self.s.E)
        counts = _INDEX * _ceil(self.R, block) * (self.s.E + 1)
        ids, ranks = _INDEX * self.R, 4 * self.R
        return [
            Launch(TORCH, counts),
            Launch("sort_rank", ids + ranks + counts),
            Launch("sort_prefix_blocks", counts + self.offsets, again=counts),
            Launch("sort_prefix_experts", 2 * self.offsets),
            Launch("sort_place", 3 * ids + ranks + counts + self.offsets),
        ]

    def mlp_forward(self) -> list[Launch]:
        s, config = self.s, self.config("gated")
        elements = s.T * s.D + 2 * s.E * s.F * s.D + 3 * self.R * s.F
        operands = self.size * elements + (_INDEX + _FLOAT) * self.R
        gated = self.tiled("_up_kernel", config, operands, _ceil(s.F, config.n), s.D, 2 * config.n)
        return [*gated, *self.gemm(self.R, s.F, s.D), self.sum()]

    def mlp_backward(self) -> list[Launch]:
        s, config = self.s, self.config("gated_grad")
        columns = _ceil(s.F, config.n)
        elements = s.T * s.D + s.E * s.F * s.D + 5 * self.R * s.F
        operands = self.size * elements + (_INDEX + _FLOAT + _FLOAT * columns) * self.R
        return [
            *self.tiled("_up_grad_kernel", config, operands, columns, s.D, config.n),
            Launch(TORCH, 2 * _INDEX * self.R),  # the source of each row
            # the partial sums of the weights' gradient, added up, brought into the tokens' order, masked
            Launch(TORCH, _FLOAT * self.R * (columns + 1) + (_FLOAT + 3 * _INDEX + 4 * _FLOAT) * self.R),
            *self.wgrad(s.T, s.D, self.R, s.F, indices=1),
            *self.wgrad(self.R, 2 * s.F, s.T, s.D, indices=1),
            *self.gemm(self.R, 2 * s.F, s.D),
            self.sum(),
        ]


def launches(shape: Shape, arch: str, dtype: torch.dtype) -> dict[str, list[Launch]]:
    """The launches of each op of the kernel suite, for routing that drops nothing."""
    s, plan = shape, _Plan(shape, arch, dtype)
    gate_forward, gate_backward = plan.gate()
    rows = plan.size * (plan.R + s.T) * s.D + _INDEX * plan.R
    return {
        "topk_gate forward": gate_forward,
        "topk_gate backward": gate_backward,
        "sort_by_expert": plan.sort(),
        "permute": [Launch("permute_rows", rows + plan.offsets)],
        "combine": [Launch("combine_rows", rows)],
        "grouped_gemm up": plan.gemm(s.T, s.D, 2 * s.F, indexed=True),
        "grouped_gemm down": plan.gemm(plan.R, s.F, s.D),
        "grouped_gemm up dgrad": plan.gemm(plan.R, 2 * s.F, s.D),
        "grouped_gemm down dgrad": plan.gemm(plan.R, s.D, s.F),
        "grouped_gemm up wgrad": plan.wgrad(plan.R, 2 * s.F, s.T, s.D, indices=1),
        "grouped_gemm down wgrad": plan.wgrad(s.T, s.D, plan.R, s.F, indices=1),
        "expert_mlp forward": plan.mlp_forward(),
        "expert_mlp backward": plan.mlp_backward(),
    }


def moved(shape: Shape, arch: str, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """(bytes that have to come from memory, bytes that tiles ask the cache for) of each op."""
    found = launches(shape, arch, dtype)
    return {op: (sum(one.bytes for one in each), sum(one.issued for one in each)) for op, each in found.items()}
