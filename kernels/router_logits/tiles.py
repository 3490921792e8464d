"""How the router's products are cut into tiles. It depends on the model, never on the number of tokens."""

# In a product [M, K] @ [K, N]: M rows, N columns, K summed.

from __future__ import annotations

from torch import Tensor

from ..matmul_tiles import MatmulTile, arch_of

#: least number of a tile's steps in a chunk of tokens, and most chunks of one product
STEPS, MOST_CHUNKS = 128, 16

#: Tiles are as large as the registers permit: each step turns two fp32 tiles into six of bf16, and there are two sums.
_USUAL = MatmulTile(64, 64, 32, 8, 3)
_AMD, _SMALL = MatmulTile(64, 64, 32, 4, 2), MatmulTile(32, 32, 16, 4, 2)
#: by architecture, if all rows start at multiples of 16 bytes, and if not: then elements are loaded one by one
_ALIGNED = {
    "interpreter": MatmulTile(32, 32, 32, 1, 1),
    "sm_90": MatmulTile(128, 128, 32, 8, 3),
    "sm_100": MatmulTile(128, 64, 32, 4, 3),
    "sm_120": MatmulTile(64, 64, 16, 8, 3),
    "gfx942": _AMD,
    "gfx950": _AMD,
}
_UNALIGNED = {
    **{name: _ALIGNED[name] for name in ("interpreter", "sm_120")},
    "gfx942": _SMALL,
    "gfx950": _SMALL,
}


def tile_for(a_MK: Tensor, b_KN: Tensor) -> MatmulTile:
    """Return the tile of a product."""
    tensors = (a_MK, b_KN)
    aligned = all(t.data_ptr() % 16 == 0 and all(s == 1 or s % 16 == 0 for s in t.stride()) for t in tensors)
    return (_ALIGNED if aligned else _UNALIGNED).get(arch_of(a_MK.device), _USUAL)
