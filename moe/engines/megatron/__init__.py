"""Training with Megatron-Core (extra ``megatron``). Only this package imports it.

:func:`moe_layer_spec` puts the MoE layer into a GPTModel of your own; :func:`build_megatron_engine` trains a decoder of
this package with Megatron-Core.
"""

try:
    from .config import moe_config
    from .engine import MegatronEngine, build_megatron_engine
    from .layer import MoELayer, moe_layer_spec
except ImportError as error:
    raise ImportError(f"{__name__}: {error}; install Megatron-Core with pip install 'equimoe[megatron]'") from None

__all__ = ["MegatronEngine", "MoELayer", "build_megatron_engine", "moe_config", "moe_layer_spec"]
