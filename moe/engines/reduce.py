"""Sums gradients over the ranks that hold replicas of a weight.

The step's loss is the sum of the ranks' losses, so gradients are summed over ranks, not averaged. FSDP2 reduces the
gradients of weights that it shards. The others are reduced here, in buckets, during the last backward of a step or
after it. An expert's gradient already covers all tokens of its ep group, because dispatch brought them to the expert;
it is summed only over replicas (edp).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..collectives import Axis
from ..layer import MoE
from ..model import HeadNorm
from ..parallel import Mesh
from ..parallel.grad_norm import local_part
from ..parallel.mesh import EXPERT_GRID


class Reducer:
    """Reduces the gradients of ``parameters``, each over its axis.

    :meth:`begin` looks up which weights are trainable. All ranks start buckets in the same order, so sums do not depend
    on timing, and a resumed run gets the same sums. A weight that only some ranks used gets its gradient on all ranks;
    one that no rank used gets none.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], axes: dict[str, Axis], bucket_bytes: int = 25 << 20
    ) -> None:
        self._names = {p: name for name, p in parameters.items()}
        self._axes, self._bucket_bytes = axes, bucket_bytes
        self._buckets: list[_Bucket] = []
        self._of: dict[nn.Parameter, _Bucket] = {}
        self._next = 0

    def begin(self) -> None:
        """Start a step: discard leftovers of the previous one, and put the trainable weights into buckets."""
        self._buckets, self._of, self._next = [], {}, 0
        open_buckets: dict[tuple, _Bucket] = {}
        # in reverse order, because a backward completes the gradients of the last weights first
        for p in [p for p in reversed(self._names) if p.requires_grad and self._names[p] in self._axes]:
            axis, local = self._axes[self._names[p]], local_part(p)
            key = axis.name, local.dtype, local.device
            bucket = open_buckets.get(key)
            if bucket is None or bucket.nbytes + local.nbytes > self._bucket_bytes:
                bucket = open_buckets[key] = _Bucket(axis)
                self._buckets.append(bucket)
            bucket.add(p, local.nbytes)
            self._of[p] = bucket

    @contextmanager
    def overlapped(self) -> Iterator[None]:
        """Context for the step's last backward: reduces buckets in order, as soon as their gradients are complete.

        With FSDP, buckets are reduced after the backward: FSDP delivers a gradient once for each use of a block, and
        few small weights are left to reduce.
        """
        sharded = any(isinstance(p, DTensor) for p in self._of)
        handles = [] if sharded else [p.register_post_accumulate_grad_hook(self._ready) for p in self._of]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def finish(self) -> None:
        """Reduce the remaining buckets and wait for all. Every rank must call this after the step's last backward."""
        while self._next < len(self._buckets):
            self._start_next()
        by_axis: dict[str, list[_Bucket]] = {}
        for bucket in self._buckets:
            by_axis.setdefault(bucket.axis.name, []).append(bucket)
        used = {name: _anywhere(buckets) for name, buckets in by_axis.items()}
        for bucket in self._buckets:
            bucket.deliver(used[bucket.axis.name])
        self._buckets, self._of = [], {}

    def _ready(self, parameter: Tensor) -> None:
        bucket = self._of[parameter]  # type: ignore[index]
        if bucket.work is not None or parameter in bucket.ready:
            name = self._names[parameter]  # type: ignore[index]
            raise RuntimeError(
                f"{name}: got a second gradient in one backward, as reentrant checkpointing does; "
                "use torch.utils.checkpoint with use_reentrant=False"
            )
        bucket.ready.add(parameter)
        while self._next < len(self._buckets) and self._buckets[self._next].complete:
            self._start_next()

    def _start_next(self) -> None:
        self._buckets[self._next].start()
        self._next += 1


class _Bucket:
    """Gradients that are reduced together."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.parameters: list[nn.Parameter] = []
        self.nbytes = 0
        #: parameters whose gradient is complete
        self.ready: set[Tensor] = set()
        self.work: Any = None
        #: parameters without a gradient on this rank -> the sum of the other ranks' gradients
        self.missing: dict[nn.Parameter, Tensor] = {}
        #: (gradient that keeps its memory, its sum), to be copied back
        self.copies: list[tuple[Tensor, Tensor]] = []

    def add(self, parameter: nn.Parameter, nbytes: int) -> None:
        self.parameters.append(parameter)
        self.nbytes += nbytes

    @property
    def complete(self) -> bool:
        return len(self.ready) == len(self.parameters)

    @torch.no_grad()
    def start(self) -> None:
        """Copy the gradients into one flat tensor and start to reduce it.

        The gradients become views of the flat tensor, which frees their old memory. FSDP allocates all gradients of a
        block together, so moving them would free nothing: they keep their memory, and the sums are copied back.
        """
        parts = [local_part(torch.zeros_like(p) if p.grad is None else p.grad) for p in self.parameters]
        flat = torch.cat([part.flatten() for part in parts])
        pieces = [
            piece.view(part.shape) for piece, part in zip(flat.split([p.numel() for p in parts]), parts, strict=True)
        ]
        moves = all(part.untyped_storage().nbytes() == part.nbytes for part in parts)
        for p, part, piece in zip(self.parameters, parts, pieces, strict=True):
            if p.grad is None:
                self.missing[p] = piece
            elif moves:
                p.grad = like(p.grad, piece)
            else:
                self.copies.append((part, piece))
        self.work = dist.all_reduce(flat, group=self.axis.group, async_op=True)

    def deliver(self, used: dict[nn.Parameter, bool]) -> None:
        """Wait for the sum, and give it also to weights that only other ranks ``used``."""
        self.work.wait()
        for gradient, piece in self.copies:
            gradient.copy_(piece)
        for p, piece in self.missing.items():
            if used[p]:
                p.grad = like(p, piece)


def _anywhere(buckets: list[_Bucket]) -> dict[nn.Parameter, bool]:
    """Return for each weight whether any rank of the axis has its gradient.

    The host waits for the answer only if this rank lacks a gradient.
    """
    parameters = [p for bucket in buckets for p in bucket.parameters]
    missing = {p for bucket in buckets for p in bucket.missing}
    device = local_part(parameters[0]).device
    here = torch.ones(len(parameters), dtype=torch.int32, device=device)
    if missing:
        here = torch.tensor([p not in missing for p in parameters], dtype=torch.int32, device=device)
    dist.all_reduce(here, group=buckets[0].axis.group)
    found = here.tolist() if missing else [1] * len(parameters)
    return {p: bool(count) for p, count in zip(parameters, found, strict=True)}


def like(model: Tensor, piece: Tensor) -> Tensor:
    """Wrap ``piece``, this rank's part, as a DTensor if ``model`` is one, with the same mesh and placements."""
    if not isinstance(model, DTensor):
        return piece
    return DTensor.from_local(
        piece, model.device_mesh, model.placements, run_check=False, shape=model.shape, stride=model.stride()
    )


def reduction_axes(parts: list[nn.Module], parameters: dict[str, nn.Parameter], mesh: Mesh | None) -> dict[str, Axis]:
    """Return the axis over which each parameter's gradient must be summed after a backward.

    Parameters whose gradient is complete already are left out.
    """
    if mesh is None:
        return {}
    # layers that are replicated over tp, but process different tokens (MoE) or heads (HeadNorm) on each rank
    inside = {p for part in parts for m in part.modules() if isinstance(m, (MoE, HeadNorm)) for p in m.parameters()}
    found = {name: mesh[axis] for name, p in parameters.items() if (axis := _axis(p, p in inside, mesh))}
    return {name: axis for name, axis in found.items() if axis.size > 1}


def _axis(parameter: nn.Parameter, sees_own_tokens: bool, mesh: Mesh) -> str:
    degrees = mesh.degrees
    dims = set(parameter.device_mesh.mesh_dim_names or ()) if isinstance(parameter, DTensor) else set()
    sharded = degrees.data_parallel == "fsdp"
    if dims & {*EXPERT_GRID[1:]}:
        return "" if sharded else "edp"
    partial = "tp" not in dims and (degrees.sequence_parallel or sees_own_tokens)
    if sharded:
        return "tp" if partial else ""
    return "stage" if partial else "dense"
