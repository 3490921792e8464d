"""What all engines do at both ends of a step: prepare its micro-batches, and decide whether to update the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..collectives import LOCAL, world_axis
from ..health import finite_everywhere
from ..layer import MoE
from ..parallel import IGNORED, LocalBatch, Mesh, check_trained_alike, digest, take_local_batch
from ..transfer import Reading, to_device
from .base import Accept, Batch, Computed


def codes_read(parts: Sequence[nn.Module]) -> str | None:
    """Return what the routers of a model, or of some stages of it, read of each token besides its hidden state."""
    found = {m.router.reads for part in parts for m in part.modules() if isinstance(m, MoE)} - {None}
    return found.pop() if found else None


def local_batches(
    batches: Sequence[Batch], mesh: Mesh | None, device: torch.device, parts: Sequence[nn.Module]
) -> list[LocalBatch]:
    """Return this rank's part of each micro-batch, on ``device``, with the codes that the routers of ``parts`` read."""
    codes_of = CODES[codes_read(parts)]

    def moved(t: Tensor | None) -> Tensor | None:
        return None if t is None else to_device(t, device)

    return [
        take_local_batch(
            to_device(b.inputs, device),
            to_device(b.labels, device),
            moved(b.mask),
            moved(b.documents),
            mesh,
            moved(codes_of(b)),
        )
        for b in batches
    ]


def _tasks(batch: Batch) -> Tensor | None:
    if batch.tasks is None:
        return None
    sequences, length = batch.inputs.shape[:2]
    if batch.tasks.shape != (sequences,) or batch.tasks.dtype != torch.int64:
        raise ValueError(
            f"batch.tasks: {batch.tasks.dtype} of shape {tuple(batch.tasks.shape)}; give torch.int64 of shape "
            f"({sequences},), the task of each sequence"
        )
    return batch.tasks[:, None].expand(sequences, length)


#: what routers read -> function from a micro-batch to it, int64 [B, S]; None: it is not given
CODES: dict[str | None, Callable[[Batch], Tensor | None]] = {
    None: lambda batch: None,
    "tokens": lambda batch: batch.inputs,
    "tasks": _tasks,
}


class Counted(NamedTuple):
    """What the ranks count at the start of a step."""

    #: int64 scalars, over all ranks: positions that the loss counts, and tokens that MoE layers route
    tokens: Tensor
    routed: Tensor
    #: raises ValueError, on every rank, if ranks train different weights, whose gradients would be added up. Every rank
    #: calls it before its first gradient is reduced: later calls find the answer there, and need not wait for it
    check_alike: Callable[[], None]


def count_tokens(
    batches: Sequence[Batch], local: Sequence[LocalBatch], mesh: Mesh | None, parameters: dict[str, nn.Parameter]
) -> Counted:
    """Count the tokens of a step on all ranks. Raises ValueError, on every rank, without micro-batches."""
    if not batches:
        raise ValueError("batches=[]: a step needs micro-batches; pass at least one")
    counted = torch.stack([valid_positions(batch) for batch in local]).sum()
    # all ranks of a tensor-parallel or context-parallel group have the same batches: count them once
    whole = mesh is None or mesh["tp"].rank == 0
    first = whole and (mesh is None or mesh["cp"].rank == 0)
    routed = torch.zeros_like(counted) + first * sum(b.inputs.shape[:2].numel() for b in batches if b.mask is None)
    for batch in batches:
        if batch.mask is not None and first:
            routed += to_device(batch.mask.sum(), routed.device)
    if mesh is None or mesh["stage"].size == 1:
        return Counted(counted, routed, lambda: None)
    trained = digest([name for name, p in parameters.items() if p.requires_grad])
    sums = torch.stack([counted * whole, routed, torch.full_like(routed, trained)])
    dist.all_reduce(sums, group=mesh["stage"].group)
    stage, found = mesh["stage"], Reading(sums[2])

    def check_alike() -> None:
        if not bool(found.get() == trained * stage.size):  # a dry run assumes that a condition holds
            check_trained_alike(parameters, stage)

    return Counted(sums[0], sums[1], check_alike)


def valid_positions(batch: LocalBatch) -> Tensor:
    """Return an int64 scalar: the number of positions of a batch that the loss counts."""
    labels = batch.labels
    if not labels.is_floating_point():
        return (labels != IGNORED).sum()
    valid = batch.mask if batch.mask is not None else torch.ones(labels.shape[:2], device=labels.device)
    return valid.sum().long()


def accepted(accept: Accept | None, computed: Computed, mesh: Mesh | None) -> bool:
    """Return whether to update the weights: what ``accept`` says, or whether all numbers are finite on all ranks."""
    if accept is not None:
        return accept(computed)
    return finite_everywhere(computed.losses, computed.norm, LOCAL if mesh is None else world_axis())


@contextmanager
def evaluation_mode(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Context in which all modules are in evaluation mode; restores each module's mode afterwards."""
    before = [(module, module.training) for part in parts for module in part.modules()]
    try:
        for part in parts:
            part.eval()
        yield
    finally:
        for module, training in before:
            module.training = training
