"""A drop-in Mixture-of-Experts layer with exact load balancing over the global batch.

>>> from equimoe.moe import MoE, MoEConfig
>>> layer = MoE(MoEConfig(hidden_size=512, intermediate_size=1024, num_experts=16, top_k=2))
"""

from .balance import Step, counting_pass, recompute, use_gradient_scaler
from .config import (
    BalanceConfig,
    CapacityConfig,
    DispatchConfig,
    ExtraLossConfig,
    MoEConfig,
    RouterConfig,
    ZeroComputationConfig,
)
from .experts import cast_once
from .layer import MoE
from .placement import Owners, Placement
from .routing import PassedLogits
from .types import Routing, RoutingStats
from .version import __version__

__all__ = [
    "BalanceConfig",
    "CapacityConfig",
    "DispatchConfig",
    "ExtraLossConfig",
    "MoE",
    "MoEConfig",
    "Owners",
    "PassedLogits",
    "Placement",
    "RouterConfig",
    "Routing",
    "RoutingStats",
    "Step",
    "ZeroComputationConfig",
    "__version__",
    "cast_once",
    "counting_pass",
    "recompute",
    "use_gradient_scaler",
]
