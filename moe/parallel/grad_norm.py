"""Clips gradients by their global norm, where some are replicated and others sharded over mesh axes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..collectives import LOCAL, Axis, sum_over


def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float, stages: Axis = LOCAL) -> Tensor:
    """Clip the gradients of ``parameters`` by their joint norm, see :func:`clip_gradients_`; return the norm.

    Use it for a model that :func:`equimoe.moe.parallel.parallelize` has split. There, torch's function of the same name
    raises "got mixed torch.Tensor and DTensor" or "must have the same mesh": experts and dense weights are sharded over
    different ranks, and torch cannot add norms of different meshes.
    """
    parameters = list(parameters)
    device = parameters[0].device if parameters else torch.device("cpu")
    return clip_gradients_([p.grad for p in parameters if p.grad is not None], max_norm, device, stages)


def clip_gradients_(grads: list[Tensor], max_norm: float, device: torch.device, stages: Axis = LOCAL) -> Tensor:
    """Clip gradients to a joint 2-norm of at most ``max_norm`` (0: do not clip); return the norm before clipping.

    Each element counts once: squares of a sharded gradient are summed over the axes that shard it, those of a
    replicated one are not. The norm includes the parameters of all pipeline ``stages``. If the norm is not finite,
    gradients are left alone; the caller should then skip the step.
    """
    by_split: dict[tuple, list[Tensor]] = {(): []}
    for grad in grads:
        by_split.setdefault(_splitting_groups(grad), []).append(local_part(grad))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for groups, parts in by_split.items():
        square = torch.zeros_like(total)
        if parts:
            norms = torch.stack(torch._foreach_norm(parts, 2.0, dtype=torch.float64))
            square = norms.square().sum()
        for group in groups:
            dist.all_reduce(square, group=group)
        total = total + square
    norm = sum_over(total, stages).get().sqrt()
    factor = max_norm / (float(norm) + 1e-6)  # the same formula as torch.nn.utils.clip_grad_norm_
    if max_norm > 0 and 0 < factor < 1:
        torch._foreach_mul_([local_part(grad) for grad in grads], factor)
    return norm.float()


def _splitting_groups(grad: Tensor) -> tuple:
    if not isinstance(grad, DTensor):
        return ()
    mesh = grad.device_mesh
    return tuple(mesh.get_group(dim) for dim, placed in enumerate(grad.placements) if not placed.is_replicate())


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
