"""The decoder that recipes, tests and imported weights use, and its attention."""

from .attention import ATTENTION, Attention, GroupedAttention, HeadNorm, JointNorm, LatentAttention
from .decoder import Block, Decoder, numbered_moe_layers
from .mixed import merge_experts, mix_lora

__all__ = [
    "ATTENTION",
    "Attention",
    "Block",
    "Decoder",
    "GroupedAttention",
    "HeadNorm",
    "JointNorm",
    "LatentAttention",
    "merge_experts",
    "mix_lora",
    "numbered_moe_layers",
]
