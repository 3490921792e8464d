"""The routed and shared experts: MLPs on rows, without communication."""

from .routed import RoutedExperts
from .shared import SharedExperts, SwiGLU

__all__ = ["RoutedExperts", "SharedExperts", "SwiGLU"]
