"""The tile sizes of the matrix kernels, as a table, so that a new batch size needs no tuning and no compilation.

benchmarks/kernels/compile_gate.py checks every entry against its chip and the table of compiled kernels.
"""

# A tile has M rows and N columns, and adds up K products at a time.

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch


class MatmulTile(NamedTuple):
    """One tile shape. ``group`` row tiles are computed together, so that they share weights in the L2 cache."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int
    group: int = 8


#: in order: a plain product; the up product with its activation; gate and up as one product with their activation
#: (``n`` columns of both together); the gradient of the activation's input; weight gradients
OPS = ("gemm", "plain", "gated", "gated_grad", "wgrad")
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
BUCKETS = ("few", "many")
#: with fewer rows per expert than this on average, kernels use the "few" tiles
MANY_ROWS = 256

_SMALL = MatmulTile(16, 16, 16, 1, 1, 2)
_FP32 = {
    "gemm": MatmulTile(32, 64, 16, 8, 2),
    "plain": MatmulTile(32, 64, 16, 8, 2),
    "gated": MatmulTile(32, 64, 16, 8, 2),
    "gated_grad": MatmulTile(32, 32, 16, 8, 2),
    "wgrad": MatmulTile(64, 64, 16, 8, 2),
}
_FEW = {
    "gemm": MatmulTile(64, 128, 32, 4, 3),
    "plain": MatmulTile(64, 128, 32, 8, 3),
    "gated": MatmulTile(64, 128, 32, 4, 3),
    "gated_grad": MatmulTile(64, 64, 32, 4, 3),
    "wgrad": MatmulTile(64, 128, 32, 4, 3),
}
#: fp32, if not every row starts at a multiple of 16 bytes: 32 x 64 would spill a scalar register on AMD's chips
_FP32_UNALIGNED = {**_FP32, "gemm": MatmulTile(64, 32, 16, 8, 2)}
#: 16 bits, if not every row starts at a multiple of 16 bytes: each element is loaded separately, without stages in
#: shared memory, and the addresses fill the registers. Larger tiles would spill up to 3 KiB to the stack.
_UNALIGNED = {
    "gemm": MatmulTile(128, 64, 32, 8, 2),
    "plain": MatmulTile(64, 64, 32, 8, 2),
    "gated": MatmulTile(64, 64, 32, 4, 2),
    "gated_grad": MatmulTile(64, 32, 32, 4, 2),
    "wgrad": MatmulTile(64, 64, 32, 8, 2),
}
#: "gated_grad" spills two registers on gfx950 with four warps, and some on sm_100 with eight
_UNALIGNED_AMD = {**_UNALIGNED, "gated_grad": MatmulTile(64, 32, 32, 8, 2)}
_HALF: dict[tuple[str, str], dict[str, MatmulTile]] = {
    ("sm_80", "few"): _FEW,
    ("sm_80", "many"): {
        "gemm": MatmulTile(128, 128, 32, 8, 4),
        "plain": MatmulTile(128, 64, 32, 8, 4),
        "gated": MatmulTile(128, 128, 32, 8, 4),
        "gated_grad": MatmulTile(128, 32, 32, 8, 3),
        "wgrad": MatmulTile(128, 128, 32, 8, 4),
    },
    ("sm_90", "few"): {
        "gemm": MatmulTile(64, 128, 64, 4, 4),
        "plain": MatmulTile(64, 128, 64, 8, 4),
        "gated": MatmulTile(64, 128, 64, 4, 4),
        "gated_grad": MatmulTile(64, 64, 64, 8, 3),
        "wgrad": MatmulTile(64, 128, 64, 4, 3),
    },
    # Clocks per 64 products in K on an H200, as tensor cores / shared memory / L2 (benchmarks/kernels/predict.py): a
    # 128 x 256 tile takes 1024 / 1024 / 1298, a 128 x 128 one 512 / 640 / 865 and gate and up as two products of 64
    # columns 512 / 768 / 865. L2 limits all of them, so tiles are as wide as the registers permit. The gradient behind
    # the activation has 128 columns, because what follows its product would not fit into registers for 256.
    ("sm_90", "many"): {
        "gemm": MatmulTile(128, 256, 64, 8, 3),
        "plain": MatmulTile(128, 128, 64, 8, 4),
        "gated": MatmulTile(128, 256, 64, 8, 3),
        "gated_grad": MatmulTile(128, 128, 64, 8, 3),
        "wgrad": MatmulTile(128, 256, 64, 8, 4),
    },
    ("sm_100", "few"): {
        "gemm": MatmulTile(64, 128, 64, 4, 4),
        "plain": MatmulTile(64, 128, 64, 8, 4),
        "gated": MatmulTile(64, 128, 64, 4, 4),
        "gated_grad": MatmulTile(64, 64, 64, 8, 3),
        "wgrad": MatmulTile(64, 128, 64, 4, 3),
    },
    ("sm_100", "many"): {
        "gemm": MatmulTile(128, 256, 64, 8, 3),
        "plain": MatmulTile(128, 128, 64, 8, 4),
        "gated": MatmulTile(128, 128, 64, 8, 4),
        "gated_grad": MatmulTile(128, 64, 64, 8, 3),
        "wgrad": MatmulTile(128, 128, 64, 8, 3),
    },
    ("sm_120", "few"): {**_FEW, "gated_grad": MatmulTile(64, 32, 32, 4, 3)},
    ("sm_120", "many"): {
        "gemm": MatmulTile(128, 128, 32, 8, 3),
        "plain": MatmulTile(128, 128, 32, 8, 3),
        "gated": MatmulTile(128, 128, 32, 8, 3),
        "gated_grad": MatmulTile(128, 32, 32, 8, 3),
        "wgrad": MatmulTile(128, 128, 32, 8, 3),
    },
    **{
        (arch, "few"): {**{op: MatmulTile(64, 64, 32, 4, 2) for op in OPS}, "gated": MatmulTile(64, 128, 32, 4, 2)}
        for arch in ("gfx942", "gfx950")
    },
    **{
        (arch, "many"): {
            "gemm": MatmulTile(128, 128, 64, 8, 2),
            "plain": MatmulTile(128, 128, 64, 8, 2),
            "gated": MatmulTile(128, 128, 64, 8, 2),
            "gated_grad": MatmulTile(128, 64, 64, 8, 2),
            "wgrad": MatmulTile(128, 128, 64, 8, 2),
        }
        for arch in ("gfx942", "gfx950")
    },
}


def shipped_tile(op: str, arch: str, dtype: torch.dtype, rows_per_expert: int, aligned: bool = True) -> MatmulTile:
    """Look up the tile of ``op`` (one of OPS) on ``arch`` (one of ARCHS, or "interpreter").

    ``aligned`` says whether every width is a multiple of 16 elements and every address a multiple of 16 bytes.
    """
    if arch == "interpreter":
        return _SMALL
    if dtype == torch.float32:
        return (_FP32 if aligned else _FP32_UNALIGNED)[op]
    if not aligned:
        return (_UNALIGNED_AMD if arch.startswith("gfx") else _UNALIGNED)[op]
    return _HALF[arch, BUCKETS[rows_per_expert >= MANY_ROWS]][op]


@lru_cache
def _gpu_arch(index: int) -> str:
    if torch.version.hip:
        name = torch.cuda.get_device_properties(index).gcnArchName
        return "gfx950" if name.startswith("gfx95") else "gfx942"
    capability = torch.cuda.get_device_capability(index)
    # 8.6, 8.7 and 8.9 have the instructions of 8.0, but only as much shared memory as 12.0
    table = {8: "sm_80" if capability[1] == 0 else "sm_120", 9: "sm_90", 10: "sm_100"}
    return table.get(capability[0], "sm_120")


def arch_of(device: torch.device) -> str:
    """Return the table's name for a device's architecture; "interpreter" for the CPU."""
    if device.type == "cpu":
        return "interpreter"
    return _gpu_arch(torch.cuda.current_device() if device.index is None else device.index)
