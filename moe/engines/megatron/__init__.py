"""The MoE layer in models of Megatron-Core (0.16).

:func:`moe_layer_spec` plugs the layer into a GPTModel. docs/engines.md has a complete script.
"""

from .config import moe_config
from .layer import MoELayer, moe_layer_spec

__all__ = ["MoELayer", "moe_config", "moe_layer_spec"]
