"""How the gate's kernels cut their work: pure functions of the model, never of the number of tokens."""

# T tokens, G groups, J experts of a group, E = G * J columns, K choices, each padded to a power of two.

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .._triton import next_power_of_2
from .gate import Method


class Tile(NamedTuple):
    """How a chunk is walked."""

    #: tokens per program, and per tile
    chunk: int
    tokens: int
    warps: int


#: by the number of columns, the next larger power of two; never by the number of tokens. Each thread has 8 elements
#: (16 in the largest), which keeps the forward at half of a thread's registers, so that more blocks share a processor.
TILES = {
    32: Tile(64, 32, 4),
    64: Tile(64, 16, 4),
    128: Tile(64, 8, 4),
    256: Tile(64, 4, 4),
    512: Tile(64, 4, 8),
    1024: Tile(32, 1, 4),
    2048: Tile(32, 1, 8),
    4096: Tile(32, 1, 16),
    8192: Tile(32, 1, 16),
}
#: chunks and columns that the second kernel adds up at a time
REDUCE_CHUNKS, REDUCE_COLUMNS = 128, 8
MAX_EXPERTS, MAX_K = 4096, 64


def tile_for(columns: int) -> Tile:
    """The tile for so many columns, a power of two."""
    return TILES[max(columns, 32)]


def _columns(experts: int, groups: int, kept_groups: int) -> tuple[int, int]:
    """Padded groups and padded experts of a group."""
    groups = groups if kept_groups < groups else 1
    return next_power_of_2(groups), next_power_of_2(experts // groups)


def forward_constants(experts: int, method: Method) -> dict[str, int | bool]:
    groups, size = _columns(experts, method.groups, method.kept_groups)
    tile, limited = tile_for(groups * size), method.kept_groups < method.groups
    return {
        "E": experts, "K": method.k, "GROUPS": method.groups if limited else 1,
        "KEPT": method.kept_groups if limited else 1, "SIGMOID": method.score == "sigmoid",
        "NORMALIZE": method.normalize, "AFTER": method.softmax_after_topk, "CHUNK": tile.chunk, "BT": tile.tokens,
        "BG": groups, "BJ": size, "BK": next_power_of_2(method.k),
    }  # fmt: skip


def forward_warps(constants: dict[str, int | bool], given: bool) -> int:
    """A given choice needs no keys, so that its threads can hold more columns."""
    warps = tile_for(constants["BG"] * constants["BJ"]).warps
    return min(warps, 8) if given else warps


def backward_constants(experts: int, method: Method) -> dict[str, int | bool]:
    columns = next_power_of_2(experts)
    tile = tile_for(columns)
    return {
        "E": experts, "K": method.k, "SIGMOID": method.score == "sigmoid", "NORMALIZE": method.normalize,
        "AFTER": method.softmax_after_topk, "CHUNK": tile.chunk, "BT": tile.tokens, "BE": columns,
        "BK": next_power_of_2(method.k),
    }  # fmt: skip


#: at least one model for every tile: experts, dtype of the logits, has a bias, has a mask, method
COMPILED: tuple[tuple[int, str, bool, bool, Method], ...] = (
    (1, "*fp32", False, False, Method(1, "softmax", 1, 1, True, False, 1.0, 1)),
    (8, "*bf16", False, True, Method(2, "softmax", 1, 1, False, True, 1.0, 1)),
    (60, "*fp32", False, True, Method(4, "softmax", 1, 1, False, False, 1.0, 1)),
    (64, "*fp16", True, False, Method(6, "sigmoid", 1, 1, True, False, 1.0, 1)),
    (128, "*fp32", False, False, Method(8, "softmax", 1, 1, True, False, 1.0, 1)),
    (160, "*fp32", False, True, Method(6, "softmax", 8, 3, False, False, 1.0, 1)),
    (256, "*fp32", True, True, Method(8, "sigmoid", 8, 4, True, False, 1.0, 1)),
    (512, "*fp32", True, False, Method(10, "sigmoid", 1, 1, True, False, 1.0, 1)),
    (1024, "*bf16", False, False, Method(16, "softmax", 1, 1, False, True, 1.0, 1)),
    (2048, "*fp32", True, True, Method(32, "sigmoid", 16, 4, True, False, 1.0, 1)),
    (4096, "*fp32", False, False, Method(64, "softmax", 1, 1, True, False, 1.0, 1)),
    (4092, "*fp32", True, True, Method(64, "sigmoid", 33, 9, True, False, 1.0, 1)),
)


def compiled() -> Iterator[tuple[str, str, dict[str, int | bool], str, int]]:
    """What is compiled: the name of a kernel, the types of its arguments, its constants, a label and its warps."""
    for experts, logits, has_bias, has_mask, method in COMPILED:
        bias, mask = "*fp32" if has_bias else "None", "*u8" if has_mask else "None"
        label = f"E{experts} K{method.k} {method.score} {logits[1:]}"
        constants = forward_constants(experts, method)
        types = f"{logits} {bias} {mask} None *i64 *fp32 *i32 *fp32 i32 i32 fp32"
        yield "gate_forward", types, constants, label, forward_warps(constants, given=False)
        constants = forward_constants(experts, method._replace(groups=1, kept_groups=1))
        types = f"{logits} None {mask} *i64 *i64 *fp32 *i32 *fp32 i32 i32 fp32"
        yield "gate_forward", types, constants, f"given {label}", forward_warps(constants, given=True)
        constants = backward_constants(experts, method)
        types = f"{logits} {mask} *i64 *fp32 *fp32 *fp32 {logits} i32 i32 fp32"
        yield "gate_backward", types, constants, label, tile_for(constants["BE"]).warps
        constants = {"E": experts, "BC": REDUCE_CHUNKS, "BW": REDUCE_COLUMNS}
        yield "gate_reduce", "*i32 *fp32 *i64 *i64 *fp32 *fp32 i32", constants, f"E{experts}", 4
