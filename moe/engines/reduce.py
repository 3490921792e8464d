"""Gradients, added up over the ranks that hold copies of a weight.

Every rank's loss is its share of the whole, and gradients are sums over ranks. FSDP2 reduces those of weights that it
shards. The others are reduced here in buckets: while the last backward of a step still runs, or after it. An expert's
gradient already holds the tokens of its whole ep group, which the exchange brought there; only replicas (edp) are added
up.
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

_EXPERT = {"edp_replicate", "edp_shard", "ep", "etp"}


class Reducer:
    """Reduces the gradients of ``parameters``, each over its axis.

    Which weights are trained is looked up at every :meth:`begin`. Buckets are started in one order on all ranks, so the
    sums do not depend on timing, and a resumed run finds the same ones. A weight that only some ranks used is reduced
    and gets its gradient on all; one that no rank used keeps none.
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
        """Start a step: forget what an earlier one left, and see which weights are trained now."""
        self._buckets, self._of, self._next = [], {}, 0
        open_buckets: dict[tuple, _Bucket] = {}
        # the last weights are complete first
        for p in [p for p in reversed(self._names) if p.requires_grad and self._names[p] in self._axes]:
            axis, local = self._axes[self._names[p]], _local(p)
            key = axis.name, local.dtype, local.device
            bucket = open_buckets.get(key)
            if bucket is None or bucket.nbytes + local.nbytes > self._bucket_bytes:
                bucket = open_buckets[key] = _Bucket(axis)
                self._buckets.append(bucket)
            bucket.add(p, local.nbytes)
            self._of[p] = bucket

    @contextmanager
    def overlapped(self) -> Iterator[None]:
        """Around the step's last backward: starts a bucket as soon as its gradients are there, in order.

        Not where FSDP shards weights: it hands a gradient over each time that a block was used, and what is left to
        reduce then is small.
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
        """Reduce what has not been started, and wait for all. Every rank calls it after the step's last backward."""
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
        if bucket.work is not None or parameter in bucket.there:
            name = self._names[parameter]  # type: ignore[index]
            raise RuntimeError(
                f"{name}: got a second gradient in one backward; reentrant checkpointing cannot be reduced while the "
                "backward runs, use torch.utils.checkpoint with use_reentrant=False"
            )
        bucket.there.add(parameter)
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
        #: those whose gradient is complete
        self.there: set[Tensor] = set()
        self.work: Any = None
        #: those without a gradient on this rank, and where the sum of the other ranks' arrives
        self.missing: dict[nn.Parameter, Tensor] = {}
        #: gradients that stay where they are, and their sums
        self.copies: list[tuple[Tensor, Tensor]] = []

    def add(self, parameter: nn.Parameter, nbytes: int) -> None:
        self.parameters.append(parameter)
        self.nbytes += nbytes

    @property
    def complete(self) -> bool:
        return len(self.there) == len(self.parameters)

    @torch.no_grad()
    def start(self) -> None:
        """Copy the gradients into one piece of memory, and start its reduction. They live there from now on, unless
        that would free nothing: FSDP makes one piece of memory for all gradients of a block."""
        parts = [_local(torch.zeros_like(p) if p.grad is None else p.grad) for p in self.parameters]
        flat = torch.cat([part.flatten() for part in parts])
        pieces = [
            piece.view(part.shape) for piece, part in zip(flat.split([p.numel() for p in parts]), parts, strict=True)
        ]
        moves = all(part.untyped_storage().nbytes() == part.nbytes for part in parts)
        for p, part, piece in zip(self.parameters, parts, pieces, strict=True):
            if p.grad is None:
                self.missing[p] = piece
            elif moves:
                p.grad = _like(p.grad, piece)
            else:
                self.copies.append((part, piece))
        self.work = dist.all_reduce(flat, group=self.axis.group, async_op=True)

    def deliver(self, used: dict[nn.Parameter, bool]) -> None:
        """Wait, and give weights that other ranks used the gradient that those found."""
        self.work.wait()
        for gradient, piece in self.copies:
            gradient.copy_(piece)
        for p, piece in self.missing.items():
            if used[p]:
                p.grad = _like(p, piece)


def _anywhere(buckets: list[_Bucket]) -> dict[nn.Parameter, bool]:
    """Whether any rank of an axis has a gradient, by weight. The host waits for it where this rank lacks one."""
    parameters = [p for bucket in buckets for p in bucket.parameters]
    missing = {p for bucket in buckets for p in bucket.missing}
    device = _local(parameters[0]).device
    here = torch.ones(len(parameters), dtype=torch.int32, device=device)
    if missing:
        here = torch.tensor([p not in missing for p in parameters], dtype=torch.int32, device=device)
    dist.all_reduce(here, group=buckets[0].axis.group)
    found = here.tolist() if missing else [1] * len(parameters)
    return {p: bool(count) for p, count in zip(parameters, found, strict=True)}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(model: Tensor, piece: Tensor) -> Tensor:
    """``piece``, this rank's part of a tensor that is split in the way of ``model``."""
    if not isinstance(model, DTensor):
        return piece
    return DTensor.from_local(
        piece, model.device_mesh, model.placements, run_check=False, shape=model.shape, stride=model.stride()
    )


def reduction_axes(parts: list[nn.Module], parameters: dict[str, nn.Parameter], mesh: Mesh | None) -> dict[str, Axis]:
    """The axis over which each parameter's gradient is still in parts after a backward; only where there is one."""
    if mesh is None:
        return {}
    # layers whose copies on tensor-parallel ranks work on other tokens, or on other heads
    inside = {p for part in parts for m in part.modules() if isinstance(m, (MoE, HeadNorm)) for p in m.parameters()}
    found = {name: mesh[axis] for name, p in parameters.items() if (axis := _axis(p, p in inside, mesh))}
    return {name: axis for name, axis in found.items() if axis.size > 1}


def _axis(parameter: nn.Parameter, sees_its_own: bool, mesh: Mesh) -> str:
    degrees = mesh.degrees
    dims = set(parameter.device_mesh.mesh_dim_names or ()) if isinstance(parameter, DTensor) else set()
    sharded = degrees.data_parallel == "fsdp"
    if dims & _EXPERT:
        return "" if sharded else "edp"
    partial = "tp" not in dims and (degrees.sequence_parallel or sees_its_own)
    if sharded:
        return "tp" if partial else ""
    return "stage" if partial else "dense"
