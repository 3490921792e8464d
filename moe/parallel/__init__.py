"""Splits a model over a mesh of ranks: tensor, context, pipeline and expert parallelism, and FSDP2."""

from .alike import check_alike, check_trained_alike, digest, has_values
from .apply import parallelize
from .config import ParallelConfig
from .grad_norm import clip_grad_norm_
from .mesh import Mesh, build_mesh
from .sharded import forget_step, free_gathered
from .share import IGNORED, Share, share_of, token_nats, vocabulary_parallel

__all__ = [
    "IGNORED",
    "Mesh",
    "ParallelConfig",
    "Share",
    "build_mesh",
    "check_alike",
    "check_trained_alike",
    "digest",
    "clip_grad_norm_",
    "forget_step",
    "free_gathered",
    "has_values",
    "parallelize",
    "share_of",
    "token_nats",
    "vocabulary_parallel",
]
