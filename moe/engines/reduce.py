"""Sums gradients over the ranks that hold replicas of a weight.

The step's loss is the sum of the ranks' losses, so gradients are summed over ranks, not averaged. FSDP2 reduces the
gradients of weights that it shards. The others are reduced here, in buckets, during the last backward of a step or
after it. An expert's gradient already covers all tokens of its ep group, because dispatch brought them to the expert;
it is summed only over replicas (edp).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..collectives import Axis
from ..layer import MoE
from ..model import HeadNorm
from ..parallel import Mesh
from ..parallel.grad_norm import gradient_of, local_part
from ..parallel.mesh import EXPERT_GRID


class Reducer:
    """Reduces the gradients of ``parameters``, each over its axis.

    :meth:`begin` looks up which weights are trainable. All ranks start the same buckets in the same order, so sums do
    not depend on timing, and a resumed run gets the same sums. A weight that only some ranks used gets its gradient on
    all ranks; one that no rank used gets none. Every step that begins starts every bucket once, in the end by
    :meth:`finish` or :meth:`settle`, so that no bucket of one step meets one of another step on another rank.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], axes: dict[str, Axis], bucket_bytes: int = 25 << 20
    ) -> None:
        self._names = {p: name for name, p in parameters.items()}
        self._axes, self._bucket_bytes = axes, bucket_bytes
        self._buckets: list[_Bucket] = []
        self._of: dict[nn.Parameter, _Bucket] = {}
        self._next = 0
        self._check_alike: Callable[[], None] = lambda: None

    def begin(self, check_alike: Callable[[], None]) -> None:
        """Start a step: put the trainable weights into buckets.

        ``check_alike`` raises ValueError, on every rank, if ranks train different weights.
        """
        self.settle()
        self._check_alike, self._next = check_alike, 0
        open_buckets: dict[tuple, _Bucket] = {}
        # in reverse order, because a backward completes the gradients of the last weights first
        for p in [p for p in reversed(self._names) if p.requires_grad and self._names[p] in self._axes]:
            axis, local = self._axes[self._names[p]], local_part(p)
            key = axis.name, local.dtype, local.device
            bucket = open_buckets.get(key)
            if bucket is None or bucket.nbytes + local.nbytes > self._bucket_bytes:
                bucket = open_buckets[key] = _Bucket(axis)
            bucket.add(p, local.nbytes)
            self._of[p] = bucket
        # a bucket starts when its last weight's gradient is complete, and waits for no bucket that is complete later
        self._buckets = list(dict.fromkeys(reversed(self._of.values())))[::-1]

    def check_alike(self) -> None:
        """Raise ValueError if ranks train different weights. Call this as late as possible before the first backward.

        The host waits for the answer.
        """
        try:
            self._check_alike()
        except ValueError:
            self._buckets, self._of = [], {}  # those of other ranks are different
            raise

    @contextmanager
    def overlapped(self, backwards: int = 1) -> Iterator[None]:
        """Context for a step's last backwards: reduces buckets in order, as soon as their gradients are complete.

        A gradient is complete after this number of ``backwards``. Weights that FSDP shards must not be among the
        parameters, because FSDP delivers a gradient once for each use of a block.
        """
        for bucket in self._buckets:
            bucket.left = dict.fromkeys(bucket.parameters, backwards)
        handles = [p.register_post_accumulate_grad_hook(self._ready) for p in self._of]
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
        used = {axis: _anywhere(buckets) for axis, buckets in self._by_axis().items()}
        for bucket in self._buckets:
            bucket.deliver(used[bucket.axis.name])
        self._buckets, self._of = [], {}

    def settle(self) -> None:
        """Start the buckets that a step lacks which an exception interrupted, with NaN, and wait for none.

        Call this before a rank that has failed communicates again. Ranks that have not failed, or failed elsewhere,
        then do not take its next buckets for those that are missing, nor a sum that lacks its part for a sound one. The
        exception itself starts nothing: at its exit, a process waits for collectives that its peers may never join.
        """
        if not self._buckets:
            return
        with suppress(Exception):  # the exception that interrupted the step may have come from the process group
            self.check_alike()
            for bucket in self._buckets[self._next :]:
                bucket.fail()
            for buckets in self._by_axis().values():
                _start_count(buckets)
        self._buckets, self._of = [], {}

    def _by_axis(self) -> dict[str, list[_Bucket]]:
        found: dict[str, list[_Bucket]] = {}
        for bucket in self._buckets:
            found.setdefault(bucket.axis.name, []).append(bucket)
        return found

    def _ready(self, parameter: Tensor) -> None:
        bucket = self._of[parameter]  # type: ignore[index]
        if not bucket.left[parameter]:
            name = self._names[parameter]  # type: ignore[index]
            raise RuntimeError(
                f"{name}: got a second gradient in one backward, as reentrant checkpointing does; "
                "use torch.utils.checkpoint with use_reentrant=False"
            )
        bucket.left[parameter] -= 1
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
        #: number of backwards that each weight's gradient still lacks
        self.left: dict[Tensor, int] = {}
        self.work: Any = None
        #: weights without a gradient on this rank -> the sum of the other ranks' gradients
        self.missing: dict[nn.Parameter, Tensor] = {}
        #: (gradient that keeps its memory, its sum), to be copied back
        self.copies: list[tuple[Tensor, Tensor]] = []

    def add(self, parameter: nn.Parameter, nbytes: int) -> None:
        self.parameters.append(parameter)
        self.nbytes += nbytes

    @property
    def complete(self) -> bool:
        return not any(self.left.values())

    @torch.no_grad()
    def start(self) -> None:
        """Copy the gradients into one flat tensor and start to reduce it.

        The gradients become views of the flat tensor, which frees their old memory. FSDP allocates all gradients of a
        block together, so moving them would free nothing: they keep their memory, and the sums are copied back.
        """
        for p in self.parameters:
            p.grad = gradient_of(p)  # a rank that lacks a gradient sends as many numbers as the weight has
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

    @torch.no_grad()
    def fail(self) -> None:
        """Start to reduce NaN instead of the gradients."""
        parts = [local_part(p) for p in self.parameters]
        flat = parts[0].new_full((sum(part.numel() for part in parts),), float("nan"))
        dist.all_reduce(flat, group=self.axis.group, async_op=True)

    def deliver(self, used: dict[nn.Parameter, bool]) -> None:
        """Wait for the sum, and give it also to weights that only other ranks ``used``."""
        self.work.wait()
        for gradient, piece in self.copies:
            gradient.copy_(piece)
        for p, piece in self.missing.items():
            if used[p]:
                p.grad = like(p, piece)


def _start_count(buckets: list[_Bucket]) -> tuple[Tensor, Any]:
    """Start to count, for each weight of an axis's buckets, the ranks that have its gradient; int32."""
    parameters = [p for bucket in buckets for p in bucket.parameters]
    missing = {p for bucket in buckets for p in bucket.missing}
    device = local_part(parameters[0]).device
    here = torch.ones(len(parameters), dtype=torch.int32, device=device)
    if missing:
        here = torch.tensor([p not in missing for p in parameters], dtype=torch.int32, device=device)
    return here, dist.all_reduce(here, group=buckets[0].axis.group, async_op=True)


def _anywhere(buckets: list[_Bucket]) -> dict[nn.Parameter, bool]:
    """Return for each weight whether any rank of the axis has its gradient.

    The host waits for the answer only if this rank lacks a gradient.
    """
    here, work = _start_count(buckets)
    work.wait()
    parameters = [p for bucket in buckets for p in bucket.parameters]
    lacks = any(bucket.missing for bucket in buckets)
    found = here.tolist() if lacks else [1] * len(parameters)
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
