"""Shards weights over data-parallel ranks with torch's FSDP2; dense and expert weights each have their own mesh."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from ..collectives import gathered_weights, sharded_modules, sharded_weights
from ..experts import ShardPool
from ..layer import MoE
from ..model import Block
from .mesh import Mesh
from .tied import check_units, tied_weights


def apply_fully_sharded(model: nn.Module, mesh: Mesh, dtype: torch.dtype | None = None) -> None:
    """Shard all weights over the data-parallel ranks, in place, with dp_replicate replicas (HSDP).

    ``dtype`` is the compute dtype of weights and activations; gradients are then reduced in fp32, and routers stay in
    fp32. Gradients are summed over the ranks, not averaged.
    """
    policy, exact = MixedPrecisionPolicy(), MixedPrecisionPolicy()
    if dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    routers = list(dict.fromkeys(layer.router for layer in layers)) if dtype is not None else []
    routers = [router for router in routers if any(True for _ in router.parameters())]
    pools = [module for module in model.modules() if isinstance(module, ShardPool)]
    units = [*dict.fromkeys(layer.experts for layer in layers), *pools, *routers, *blocks]
    check_units(model, tied_weights(model), units)
    dense, expert = _submesh(mesh.dense, "dp_replicate", "fsdp"), _submesh(mesh.expert, "edp_replicate", "edp_shard")
    owned: set[nn.Parameter] = set()
    if mesh.degrees.experts == "fssdp":  # each expert has one owner, so nothing is left to shard
        owned = {weight for layer in layers for weight in layer.experts.parameters()}
        for layer in layers:
            layer.experts.dtype = dtype
        layers = []
    for pool in pools:  # every expert-parallel rank holds all of it, as dense weights
        fully_shard(pool, mesh=dense, mp_policy=policy)
    for experts, layer in {layer.experts: layer for layer in layers}.items():  # layers may share experts
        # with chunked dispatch the experts run several times per forward, but their weights should be gathered once
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
        fully_shard(block, mesh=dense, mp_policy=policy, ignored_params=owned)
    fully_shard(model, mesh=dense, mp_policy=policy, ignored_params=owned)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def free_gathered(parts: Iterable[nn.Module]) -> None:
    """Put the sharded weights back into modules that FSDP leaves gathered after a forward (its root).

    The optimizer and checkpoints know only the sharded weights.
    """
    for module in sharded_modules(parts):
        module.reshard()


def forget_step(parts: Iterable[nn.Module]) -> None:
    """Reset FSDP after an interrupted forward or backward, and drop the gradients that it has not reduced yet."""
    parts = list(parts)
    for part in parts:
        if isinstance(part, FSDPModule) and hasattr(part, "reset_iter_state"):  # not in torch 2.11
            part.reset_iter_state()
    # before torch 2.15 the reset keeps gradients that wait for the step's last micro-batch to be reduced
    for weight in gathered_weights(parts):
        weight.grad = None
    for sharded in sharded_weights(parts):
        if sharded.unsharded_accumulated_grad is not None:
            sharded.unsharded_accumulated_grad = None


def _divided(ranks: int, weight: nn.Parameter) -> Shard | None:
    """Choose the dimension along which to shard a rank's experts [e, ...]; None for the first.

    Shards over experts if they divide evenly; otherwise within each expert, so that no rank holds only padding.
    """
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    if local.shape[0] % ranks == 0:
        return None
    taken = {p.dim for p in weight.placements if isinstance(p, Shard)} if isinstance(weight, DTensor) else set()
    even = [dim for dim in range(1, local.dim()) if dim not in taken and local.shape[dim] % ranks == 0]
    return Shard(max(even, key=lambda dim: local.shape[dim])) if even else None


def _submesh(mesh: DeviceMesh, replicate: str, shard: str) -> DeviceMesh:
    """Return the mesh that FSDP shards over, with a dimension for replicas if there are several."""
    return mesh[shard] if mesh[replicate].size() == 1 else mesh[replicate, shard]
