"""Configuration of the MoE layer, and of the decoder around it.

Each section configures one part of the system. The sections of a training run are in
:mod:`equimoe.moe.train.config`.
"""

from .checks import check_literals, require
from .decoder import AttentionConfig, RecomputeConfig, RotaryScaling
from .experts import ZeroComputationConfig
from .layer import (
    BalanceConfig,
    CapacityConfig,
    DispatchConfig,
    ExtraLossConfig,
    MoEConfig,
)
from .nested import dotted
from .placement import PlacementConfig
from .routing import RouterConfig, Score

__all__ = [
    "AttentionConfig",
    "BalanceConfig",
    "CapacityConfig",
    "DispatchConfig",
    "ExtraLossConfig",
    "MoEConfig",
    "PlacementConfig",
    "RecomputeConfig",
    "RotaryScaling",
    "RouterConfig",
    "Score",
    "ZeroComputationConfig",
    "check_literals",
    "dotted",
    "require",
]
