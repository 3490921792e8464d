"""The MLPs: math on rows."""

from .grouped import GroupedExperts
from .shared import NoSharedExperts, SharedExperts, SwiGLU

__all__ = ["GroupedExperts", "NoSharedExperts", "SharedExperts", "SwiGLU"]
