"""The decoder that recipes, tests and imported weights use, and its attention."""

from .attention import ATTENTION, Attention, GroupedAttention, HeadNorm, LatentAttention
from .decoder import Block, Decoder, numbered_moe_layers

__all__ = [
    "ATTENTION",
    "Attention",
    "Block",
    "Decoder",
    "GroupedAttention",
    "HeadNorm",
    "LatentAttention",
    "numbered_moe_layers",
]
