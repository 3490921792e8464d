"""The experts, without communication: routed and shared MLPs, zero-computation experts, merged linear layers."""

from collections.abc import Callable
from functools import partial

from ..config import MoEConfig
from .local import OnlyShared, ZeroComputation, build_local
from .lora import LoRAExperts
from .merged import MergedLinear, MergedSwiGLU, importance_loss
from .replicated import ReplicatedExperts
from .routed import RoutedExperts, cast_once
from .shards import LOW_RANK, ShardedLoRAExperts, ShardPool
from .shared import SharedExperts, SwiGLU
from .unequal import UnequalExperts


def build_experts(config: MoEConfig) -> RoutedExperts:
    """Build a layer's routed experts."""
    build: Callable[..., RoutedExperts] = partial(
        RoutedExperts if config.chunks is None else UnequalExperts,
        hidden_size=config.hidden_size,
        width=config.row_width,
        backend=config.backend,
        init_std=config.init_std,
        activation=config.activation,
        gated=config.gated,
        recompute=config.recompute_experts,
    )
    return build(config.num_experts) if config.chunks is None else build(config.chunks)


__all__ = [
    "LOW_RANK",
    "LoRAExperts",
    "MergedLinear",
    "MergedSwiGLU",
    "OnlyShared",
    "ReplicatedExperts",
    "RoutedExperts",
    "ShardPool",
    "ShardedLoRAExperts",
    "SharedExperts",
    "SwiGLU",
    "UnequalExperts",
    "ZeroComputation",
    "build_experts",
    "build_local",
    "cast_once",
    "importance_loss",
]
