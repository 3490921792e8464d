"""Bytes that the Triton kernels read and write, counted launch by launch from their loads and stores.

Compared with the lower bound of ``cost.py``, this shows where the kernels move more than necessary: 64-bit indices,
tensors that one launch writes and the next one reads, weights that every tile of rows reads again.
"""

# T tokens, D hidden, F expert width, E experts, K top-k, R = T*K routed rows, W = E + 1 offsets.

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.shared.shapes import Shape
from equimoe.kernels.configs import Config, pick_config
from equimoe.kernels.topk_gate.gate import Method
from equimoe.kernels.topk_gate.tiles import forward_constants

#: largest number of experts -> rows of a block in the counting sort
_SORT_BLOCKS = {512: 512, 1 << 62: 1024}
_INDEX = 8
_FLOAT = 4
#: stands for torch operations between launches
TORCH = "torch"


class Launch(NamedTuple):
    """Bytes of one launch."""

    kernel: str
    #: every operand once
    operands: int
    #: operands that are both read and written, a second time
    again: int = 0
    #: all loads and stores that tiles issue, most of which the L2 cache answers; 0: the same as ``operands``
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

    def config(self, op: str) -> Config:
        aligned = self.s.D % 16 == self.s.F % 16 == 0
        return pick_config(op, self.arch, self.dtype, self.R // self.s.E, aligned)

    def num_tiles(self, config: Config) -> int:
        return _ceil(self.R, config.m) + self.s.E

    def tile_map(self, config: Config) -> Launch:
        return Launch("_tile_map_kernel", self.offsets + 3 * _INDEX * self.num_tiles(config))

    def tiled(self, kernel: str, config: Config, operands: int, columns: int, depth: int, width: int) -> list[Launch]:
        """Return the launches of a product in tiles of ``config.m`` rows by ``width`` weight columns by ``depth``."""
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
        method = Method(s.K, "softmax", 1, 1, True, False, 1.0, 1)
        sums = _ceil(s.T, int(forward_constants(s.E, method)["CHUNK"])) * (s.E + 1) * 8
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
            # the weights' gradient: partial sums are added, permuted to token order, and masked
            Launch(TORCH, _FLOAT * self.R * (columns + 1) + (_FLOAT + 3 * _INDEX + 4 * _FLOAT) * self.R),
            *self.wgrad(s.T, s.D, self.R, s.F, indices=1),
            *self.wgrad(self.R, 2 * s.F, s.T, s.D, indices=1),
            *self.gemm(self.R, 2 * s.F, s.D),
            self.sum(),
        ]


def launches(shape: Shape, arch: str, dtype: torch.dtype) -> dict[str, list[Launch]]:
    """Return the launches of each op of the kernel suite, for routing without drops."""
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
    """Return for each op the bytes of its operands, and the bytes that its tiles request from the cache."""
    found = launches(shape, arch, dtype)
    return {op: (sum(one.bytes for one in each), sum(one.issued for one in each)) for op, each in found.items()}
