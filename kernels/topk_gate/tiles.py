"""How the gate's kernels divide their work. It depends on the model, never on the number of tokens, which varies."""

# T tokens, G groups, J experts of a group, E = G * J columns, K choices, each padded to a power of two.

from __future__ import annotations

from typing import NamedTuple

from .._triton import next_power_of_2
from .types import GateOptions


class Tile(NamedTuple):
    """How a kernel processes a chunk of tokens."""

    #: tokens per program, and per tile
    chunk: int
    tokens: int
    warps: int


#: by the number of columns, rounded up to a power of two. Each thread has 8 elements (16 in the largest tile), so that
#: the forward needs half of a thread's registers and more blocks fit on a processor.
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
#: how many chunks and columns the second kernel adds up at a time
REDUCE_CHUNKS, REDUCE_COLUMNS = 128, 8
MAX_EXPERTS, MAX_K = 4096, 64


def tile_for(columns: int) -> Tile:
    """Return the tile for a number of columns, which is a power of two."""
    return TILES[max(columns, 32)]


def _columns(experts: int, groups: int, kept_groups: int) -> tuple[int, int]:
    """Return the padded numbers of groups and of experts per group."""
    groups = groups if kept_groups < groups else 1
    return next_power_of_2(groups), next_power_of_2(experts // groups)


def forward_constants(experts: int, options: GateOptions) -> dict[str, int | bool]:
    groups, size = _columns(experts, options.groups, options.kept_groups)
    tile, limited = tile_for(groups * size), options.kept_groups < options.groups
    return {
        "E": experts, "K": options.k, "GROUPS": options.groups if limited else 1,
        "KEPT": options.kept_groups if limited else 1, "SIGMOID": options.score == "sigmoid",
        "NORMALIZE": options.normalize, "AFTER": options.softmax_after_topk, "CHUNK": tile.chunk, "BT": tile.tokens,
        "BG": groups, "BJ": size, "BK": next_power_of_2(options.k),
    }  # fmt: skip


def forward_warps(constants: dict[str, int | bool], given: bool) -> int:
    """Return the forward kernel's number of warps. For a given choice it computes no keys, so fewer warps suffice."""
    warps = tile_for(constants["BG"] * constants["BJ"]).warps
    return min(warps, 8) if given else warps


def backward_constants(experts: int, options: GateOptions) -> dict[str, int | bool]:
    columns = next_power_of_2(experts)
    tile = tile_for(columns)
    return {
        "E": experts, "K": options.k, "SIGMOID": options.score == "sigmoid", "NORMALIZE": options.normalize,
        "AFTER": options.softmax_after_topk, "CHUNK": tile.chunk, "BT": tile.tokens, "BE": columns,
        "BK": next_power_of_2(options.k),
    }  # fmt: skip
