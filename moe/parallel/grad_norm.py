"""Norms of whole tensors, where some are replicated and others sharded over mesh axes; clips gradients by theirs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..collectives import LOCAL, Axis, sum_over

#: a CPU sums so many squares at once: the sum is precise enough in fp32, and a copy in fp64 stays in the cache
_CHUNK = 1 << 15
#: the squares of gradients whose joint square is smaller may be too small for fp32
_SMALL = 1e-30


def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float, stages: Axis = LOCAL) -> Tensor:
    """Clip the gradients of ``parameters`` by their joint norm, see :func:`clip_gradients_`; return the norm.

    Use it for a model that :func:`equimoe.moe.parallel.parallelize` has split. There, torch's function of the same name
    raises "got mixed torch.Tensor and DTensor" or "must have the same mesh": experts and dense weights are sharded over
    different ranks, and torch cannot add norms of different meshes.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    device = parameters[0].device if parameters else torch.device("cpu")
    return clip_gradients_([p.grad for p in parameters if p.grad is not None], max_norm, device, stages)


def clip_gradients_(grads: list[Tensor], max_norm: float, device: torch.device, stages: Axis = LOCAL) -> Tensor:
    """Clip gradients to a joint 2-norm of at most ``max_norm`` (0: do not clip); return the norm before clipping.

    Each element counts once: squares of a sharded gradient are summed over the axes that shard it, those of a
    replicated one are not. The norm includes the parameters of all pipeline ``stages``. If the norm is not finite,
    gradients are left alone; the caller should then skip the step. The host waits for nothing.
    """
    by_split: dict[tuple, list[Tensor]] = {(): []}
    for grad in grads:
        by_split.setdefault(_splitting_groups(grad), []).append(local_part(grad))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for groups, parts in by_split.items():
        square = torch.zeros_like(total)
        if parts:
            square = _square(parts)
        for group in groups:
            dist.all_reduce(square, group=group)
        total = total + square
    norm = sum_over(total, stages).get().sqrt()
    if grads and max_norm > 0:
        factor = max_norm / (norm + 1e-6)  # the same formula as torch.nn.utils.clip_grad_norm_
        factor = torch.where((factor > 0) & (factor < 1), factor, 1.0)  # NaN is neither
        parts = [local_part(grad) for grad in grads]
        torch._foreach_mul_(parts, factor.to(torch.promote_types(parts[0].dtype, torch.float32)))
    return norm.float()


def _square(parts: list[Tensor]) -> Tensor:
    """Return the sum of all squares, fp64, on the parts' device."""

    def square(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        return torch.stack(torch._foreach_norm(parts, 2.0, dtype=dtype)).double().square().sum()

    if all(part.is_cpu for part in parts):
        parts = [chunk for part in parts for chunk in part.flatten().split(_CHUNK)]
        if all(part.dtype == torch.float32 for part in parts):  # fp64 would be three times slower
            total = square(parts, torch.float32)
            if _SMALL < total < float("inf"):
                return total
    return square(parts, torch.float64)


def square_norms(tensors: list[Tensor]) -> list[Tensor]:
    """Return the squared 2-norm, in fp64, of every whole tensor, of which this rank may hold a part.

    A tensor of three or more dimensions is a stack of experts [E, ...]: it has the norm of each of this rank's experts,
    [e, 1, ...]. All ranks that share tensors must call this.
    """
    squares, by_split = [], dict[tuple, list[int]]()
    for i, tensor in enumerate(tensors):
        local = local_part(tensor)
        stacked = local.dim() > 2
        norm = torch.linalg.vector_norm(
            local, dim=tuple(range(1, local.dim())) if stacked else None, keepdim=stacked, dtype=torch.float64
        )
        squares.append(norm.square())
        by_split.setdefault(_splitting_groups(tensor, inside=stacked), []).append(i)
    for groups, members in by_split.items():
        joined = torch.cat([squares[i].flatten() for i in members])
        for ranks in groups:
            dist.all_reduce(joined, group=ranks)
        for i, part in zip(members, joined.split([squares[i].numel() for i in members]), strict=True):
            squares[i] = part.view_as(squares[i])
    return squares


def _splitting_groups(tensor: Tensor, inside: bool = False) -> tuple:
    """Return the groups whose ranks hold different parts of a tensor; with ``inside``, of one row of it."""
    if not isinstance(tensor, DTensor):
        return ()
    mesh, placed = tensor.device_mesh, enumerate(tensor.placements)
    splits = [axis for axis, p in placed if not (p.is_replicate() or inside and getattr(p, "dim", None) == 0)]
    return tuple(mesh.get_group(axis) for axis in splits)


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_of(weight: Tensor) -> Tensor | None:
    """Return a weight's gradient, split over ranks as the weight is.

    Under tensor parallelism, autograd computes the whole gradient of an embedding on each rank.
    """
    grad = weight.grad
    if isinstance(grad, DTensor) and isinstance(weight, DTensor) and grad.placements != weight.placements:
        return grad.redistribute(placements=weight.placements)
    return grad
