"""The routed and shared experts: MLPs on rows, without communication."""

from .grouped import GroupedExperts
from .shared import SharedExperts, SwiGLU

__all__ = ["GroupedExperts", "SharedExperts", "SwiGLU"]
