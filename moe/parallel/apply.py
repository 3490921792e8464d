"""From a plain model to a parallel one, from outside."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from ..layer import MoE
from ..model import Attention, Decoder
from .context import ContextAttention, positions
from .expert import apply_expert_parallel
from .mesh import Mesh
from .sharded import apply_fully_sharded
from .tensor import apply_tensor_parallel
from .tied import tie_again, tied_weights

M = TypeVar("M", bound=nn.Module)


def parallelize(model: M, mesh: Mesh, dtype: torch.dtype | None = None) -> M:
    """Split a model over ``mesh`` (from :func:`equimoe.moe.parallel.build_mesh`), in place.

    The weights must be the same on all ranks (same seed). MoE layers in any model get their experts split and their
    loads counted over all ranks; tensor and context parallelism, and FSDP2, know :class:`equimoe.moe.model.Decoder`
    and pipeline stages of it. ``dtype`` is what FSDP2 computes in. A weight that the model uses in several places stays
    one weight, or is refused. Gradients are sums over ranks, not means: :func:`equimoe.moe.engines.build_engine` calls
    this, and makes what reduces them.
    """
    degrees, tied = mesh.degrees, tied_weights(model)
    positions_S = apply_context_parallel(_decoder(model, "cp"), mesh) if degrees.cp > 1 else None
    for layer in [module for module in model.modules() if isinstance(module, MoE)]:
        apply_expert_parallel(layer, mesh, positions_S=positions_S)
    if degrees.tp > 1:
        apply_tensor_parallel(_decoder(model, "tp"), mesh.dense["tp"], degrees.sequence_parallel)
    tie_again(model, tied)
    if degrees.data_parallel == "fsdp":
        apply_fully_sharded(model, mesh, dtype)
    return model


def apply_context_parallel(model: Decoder, mesh: Mesh) -> Tensor | None:
    """Let attention reach over the ranks that hold parts of the same sequences.

    Returns the positions int64 [S] that this rank holds between split layers; None for a model without attention.
    """
    axis, held_S = mesh["cp"], None
    for attention in [module for module in model.modules() if isinstance(module, Attention)]:
        attention.attend = ContextAttention(axis, method=mesh.degrees.context)
        held_S = positions(attention.cos_SR.shape[0], axis.size, axis.rank)
        attention.hold(held_S)
    return None if held_S is None else held_S.tensor_split(mesh["tp"].size)[mesh["tp"].rank]


def _decoder(model: nn.Module, degree: str) -> Decoder:
    if not isinstance(model, Decoder):
        found = type(model).__name__
        raise ValueError(f"parallel.{degree}: knows how to split a Decoder, not {found}; set parallel.{degree}=1")
    return model
