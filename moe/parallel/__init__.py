"""Splits a model over a mesh of ranks: tensor, context, pipeline and expert parallelism, and FSDP2."""

from .alike import check_alike, check_trained_alike, digest, model_has_values
from .apply import parallelize
from .degrees import ParallelConfig
from .grad_norm import clip_grad_norm_
from .local_batch import IGNORED, LocalBatch, LossFunction, take_local_batch, token_losses, vocabulary_parallel
from .mesh import Mesh, build_mesh
from .sharded import forget_step, free_gathered

__all__ = [
    "IGNORED",
    "Mesh",
    "ParallelConfig",
    "LocalBatch",
    "LossFunction",
    "build_mesh",
    "check_alike",
    "check_trained_alike",
    "digest",
    "clip_grad_norm_",
    "forget_step",
    "free_gathered",
    "model_has_values",
    "parallelize",
    "take_local_batch",
    "token_losses",
    "vocabulary_parallel",
]
