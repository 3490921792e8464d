"""Weights split over data-parallel ranks: torch's FSDP2, dense and expert weights each on their own mesh."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from ..layer import MoE
from ..model import Block
from .mesh import Mesh
from .tied import check_units, tied_weights


def apply_fully_sharded(model: nn.Module, mesh: Mesh, dtype: torch.dtype | None = None) -> None:
    """Split all weights over the data-parallel ranks (and keep dp_replicate copies: HSDP), in place.

    With ``dtype``, weights and activations are computed in it; gradients are reduced in fp32, and routers stay in
    fp32. Gradients are added up over the ranks, not averaged.
    """
    policy, exact = MixedPrecisionPolicy(), MixedPrecisionPolicy()
    if dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    routers = list(dict.fromkeys(layer.router for layer in layers)) if dtype is not None else []
    check_units(model, tied_weights(model), [*dict.fromkeys(layer.experts for layer in layers), *routers, *blocks])
    dense, expert = _submesh(mesh.dense, "dp_replicate", "fsdp"), _submesh(mesh.expert, "edp_replicate", "edp_shard")
    for experts, layer in {layer.experts: layer for layer in layers}.items():  # layers may share experts
        # experts that work in chunks are called several times, and should be gathered once
        once = layer.config.dispatch.chunks > 1
        fully_shard(
            experts,
            mesh=expert,
            mp_policy=policy,
            reshard_after_forward=False if once else None,
            shard_placement_fn=partial(_divided, mesh["edp_shard"].size),
        )
    for router in routers:
        fully_shard(router, mesh=dense, mp_policy=exact)
    for block in blocks:
        fully_shard(block, mesh=dense, mp_policy=policy)
    fully_shard(model, mesh=dense, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def free_gathered(parts: Iterable[nn.Module]) -> None:
    """Free the whole weights that FSDP keeps after a forward (those of its root), so that the modules have their
    sharded ones, which optimizer and checkpoints know."""
    for module in _sharded_modules(parts):
        module.reshard()


def forget_step(parts: Iterable[nn.Module]) -> None:
    """Let FSDP forget a forward or backward that was broken off, and the gradients that it holds back of it."""
    parts = list(parts)
    for part in parts:
        if isinstance(part, FSDPModule) and hasattr(part, "reset_iter_state"):  # not in torch 2.11
            part.reset_iter_state()
    for module in _sharded_modules(parts):
        # before torch 2.15 a reset leaves the gradients of micro-batches that were to be reduced with the last one
        for group in module._get_fsdp_state()._fsdp_param_groups:
            for weight in group.fsdp_params:
                if hasattr(weight, "_unsharded_param"):
                    weight._unsharded_param.grad = None
                if weight.unsharded_accumulated_grad is not None:
                    weight.unsharded_accumulated_grad = None


def _sharded_modules(parts: Iterable[nn.Module]) -> Iterator[FSDPModule]:
    return (module for part in parts for module in part.modules() if isinstance(module, FSDPModule))


def _divided(ranks: int, weight: nn.Parameter) -> Shard | None:
    """Where to split a rank's experts [e, ...]: by expert, or within each where they are fewer than ranks or uneven.

    Otherwise most of the ranks would hold nothing but padding.
    """
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    if local.shape[0] % ranks == 0:
        return None
    taken = {p.dim for p in weight.placements if isinstance(p, Shard)} if isinstance(weight, DTensor) else set()
    even = [dim for dim in range(1, local.dim()) if dim not in taken and local.shape[dim] % ranks == 0]
    return Shard(max(even, key=lambda dim: local.shape[dim])) if even else None


def _submesh(mesh: DeviceMesh, replicate: str, shard: str) -> DeviceMesh:
    """One dimension to split over; two where there are several copies."""
    return mesh[shard] if mesh[replicate].size() == 1 else mesh[replicate, shard]
