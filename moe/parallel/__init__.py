"""Everything that knows a mesh."""

from torch.distributed.device_mesh import DeviceMesh as Mesh

from .apply import parallelize
from .grad_norm import clip_grad_norm_
from .mesh import build_mesh, check_degrees

__all__ = ["Mesh", "build_mesh", "check_degrees", "clip_grad_norm_", "parallelize"]
