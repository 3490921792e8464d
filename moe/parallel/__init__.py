"""Everything that knows a mesh."""

from .apply import parallelize
from .grad_norm import clip_grad_norm_
from .mesh import build_mesh, check_degrees

__all__ = ["build_mesh", "check_degrees", "clip_grad_norm_", "parallelize"]
