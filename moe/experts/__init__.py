"""The MLPs: math on rows."""

from .grouped import GroupedExperts
from .shared import SharedExperts, SwiGLU

__all__ = ["GroupedExperts", "SharedExperts", "SwiGLU"]
