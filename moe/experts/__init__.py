"""The routed and shared experts: MLPs on rows, without communication. Also linear experts that are merged."""

from .merged import MergedLinear, importance_loss
from .replicated import ReplicatedExperts
from .routed import RoutedExperts
from .shared import SharedExperts, SwiGLU

__all__ = ["MergedLinear", "ReplicatedExperts", "RoutedExperts", "SharedExperts", "SwiGLU", "importance_loss"]
