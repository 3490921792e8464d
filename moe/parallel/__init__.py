"""Everything that knows a mesh."""

from .apply import parallelize
from .config import ParallelConfig
from .grad_norm import clip_grad_norm_
from .mesh import Mesh, build_mesh
from .share import Share, share_of, token_nats, vocabulary_parallel

__all__ = [
    "Mesh",
    "ParallelConfig",
    "Share",
    "build_mesh",
    "clip_grad_norm_",
    "parallelize",
    "share_of",
    "token_nats",
    "vocabulary_parallel",
]
