"""Turns a plain model into a parallel one without changing the model's code."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from ..experts import MergedLinear
from ..layer import MoE
from ..model import Attention, Block, Decoder
from .context import ContextAttention, positions
from .expert import apply_expert_parallel
from .mesh import Mesh
from .sharded import apply_fully_sharded
from .tensor import apply_tensor_parallel
from .tied import tie_again, tied_weights

M = TypeVar("M", bound=nn.Module)


def parallelize(model: M, mesh: Mesh, dtype: torch.dtype | None = None, *, reduced: bool = False) -> M:
    """Split ``model`` over ``mesh`` (from :func:`equimoe.moe.parallel.build_mesh`), in place.

    All ranks must start from the same weights (same seed). In any model, the experts of MoE layers are split and their
    tokens are counted over all ranks. Tensor and context parallelism require a :class:`equimoe.moe.model.Decoder` or a
    pipeline stage of one; FSDP2 wraps its blocks one by one. ``dtype`` is FSDP2's compute dtype. A weight that the
    model uses in several places stays one weight. Raises ValueError if the split makes that impossible.

    FSDP2 sums the gradients of weights that it shards over ranks; it does not average them. Nothing here reduces the
    gradients of replicated weights. ``reduced`` promises that you sum them over the ranks yourself, before each update;
    without it, a mesh that leaves some raises ValueError. :func:`equimoe.moe.engines.build_engine` calls this function
    and reduces them. Clip gradients with :func:`clip_grad_norm_`; torch's own function raises.
    """
    if not reduced:
        _refuse_unreduced(mesh)
    degrees, tied = mesh.degrees, tied_weights(model)
    if degrees.tp * degrees.cp > 1 and any(isinstance(module, MergedLinear) for module in model.modules()):
        raise ValueError(
            f"parallel.tp={degrees.tp}, parallel.cp={degrees.cp}: merged linear experts read whole sequences; set both "
            "to 1"
        )
    positions_S = apply_context_parallel(_decoder(model, "cp"), mesh) if degrees.cp > 1 else None
    for layer in [module for module in model.modules() if isinstance(module, MoE)]:
        apply_expert_parallel(layer, mesh, positions_S=positions_S)
    if degrees.experts == "fssdp":
        for block in model.modules():
            if isinstance(block, Block) and isinstance(block.mlp, MoE):
                block.register_forward_pre_hook(_start_replicas)
    if degrees.tp > 1:
        apply_tensor_parallel(_decoder(model, "tp"), mesh.dense["tp"], degrees.sequence_parallel)
    tie_again(model, tied)
    if degrees.data_parallel == "fsdp":
        apply_fully_sharded(model, mesh, dtype)
    return model


def _refuse_unreduced(mesh: Mesh) -> None:
    degrees = mesh.degrees
    if degrees.data_parallel == "ddp" and mesh["stage"].size > 1:
        name, remedy = "data_parallel='ddp'", "set parallel.data_parallel='fsdp', train with build_engine(...)"
    elif degrees.tp > 1:
        name, remedy = f"tp={degrees.tp}", "train with build_engine(...)"
    else:
        return
    raise ValueError(
        f"parallel.{name}: parallelize leaves replicated weights whose gradients nobody sums over ranks, so that their "
        f"replicas would drift apart; {remedy}, or sum them yourself and pass reduced=True"
    )


def apply_context_parallel(model: Decoder, mesh: Mesh) -> Tensor | None:
    """Make attention span the ranks that hold parts of the same sequences.

    Returns int64 [S], the positions of the tokens that this rank's MoE layers process; None for a model without
    attention.
    """
    axis, held_S = mesh["cp"], None
    for attention in [module for module in model.modules() if isinstance(module, Attention)]:
        attention.span(ContextAttention(axis, exchange=mesh.degrees.context))
        held_S = positions(attention.cos_SR.shape[0], axis.size, axis.rank)
        attention.hold(held_S)
    return None if held_S is None else held_S.tensor_split(mesh["tp"].size)[mesh["tp"].rank]


def _start_replicas(block: Block, _inputs: object) -> None:
    """Let the copies of experts' weights travel while the block's attention computes."""
    assert isinstance(block.mlp, MoE)
    if block.mlp.replication is not None:
        block.mlp.replication.start(block.mlp.experts)


def _decoder(model: nn.Module, degree: str) -> Decoder:
    if not isinstance(model, Decoder):
        found = type(model).__name__
        raise ValueError(f"parallel.{degree}: can split only a Decoder, not {found}; set parallel.{degree}=1")
    return model
