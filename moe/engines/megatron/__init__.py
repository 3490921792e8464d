"""Training with Megatron-Core (extra ``megatron``). Only this package imports it.

:func:`moe_layer_spec` puts the MoE layer into a GPTModel of your own; :func:`build_megatron_engine` trains a decoder of
this package with Megatron-Core.
"""

from .config import moe_config
from .engine import MegatronEngine, build_megatron_engine
from .layer import MoELayer, moe_layer_spec

__all__ = ["MegatronEngine", "MoELayer", "build_megatron_engine", "moe_config", "moe_layer_spec"]
