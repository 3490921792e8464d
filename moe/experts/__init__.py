"""The experts, without communication: routed and shared MLPs, zero-computation experts, merged linear layers."""

from .local import OnlyShared, ZeroComputation, build_local
from .lora import LoRAExperts
from .merged import MergedLinear, MergedSwiGLU, importance_loss
from .replicated import ReplicatedExperts
from .routed import RoutedExperts
from .shared import SharedExperts, SwiGLU

__all__ = [
    "LoRAExperts",
    "MergedLinear",
    "MergedSwiGLU",
    "OnlyShared",
    "ReplicatedExperts",
    "RoutedExperts",
    "SharedExperts",
    "SwiGLU",
    "ZeroComputation",
    "build_local",
    "importance_loss",
]
