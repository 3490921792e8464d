"""Gradients of a parallel model, joined over the ranks that hold copies of a weight.

Every rank's loss is its share of the whole, and gradients are sums over ranks. FSDP2 adds up those of the weights that
it splits, torch's DistributedDataParallel those of plain weights; what is left is added up here, once a step: split
weights without FSDP2, and weights whose copies on tensor-parallel ranks saw different tokens. An expert's gradient
already holds the tokens of its whole ep group, which the exchange brought there; only its replicas (edp) are joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..layer import MoE
from ..parallel import Mesh

_EXPERT = {"edp_replicate", "edp_shard", "ep", "etp"}


class DataParallel:
    """Runs a model from :func:`equimoe.moe.parallel.parallelize` on every rank's own tokens.

    >>> engine = DataParallel(model, mesh)
    >>> for i, batch in enumerate(micro_batches):
    ...     with engine.accumulate(last=i + 1 == len(micro_batches)):
    ...         (loss_sum(engine(batch)) / tokens_of_the_step).backward()
    >>> engine.reduce_gradients()

    Pipeline stages, whose forward belongs to their schedule, are given as a list: no call, only ``reduce_gradients``.
    """

    def __init__(self, model: nn.Module | Sequence[nn.Module], mesh: Mesh | None) -> None:
        self.parts = [model] if isinstance(model, nn.Module) else list(model)
        self.mesh = mesh
        self.forward: Any = self.parts[0]
        self._joined_by_ddp: set[int] = set()
        if mesh is not None and mesh.degrees.data_parallel == "ddp" and mesh["dense"].size > 1:
            if isinstance(model, nn.Module) and mesh.degrees.pp == 1:
                self.forward = self._wrap(model, mesh)

    def __call__(self, *args: Any) -> Any:
        return self.forward(*args)

    @property
    def model(self) -> nn.Module:
        """The model, or the first stage of this rank."""
        return self.parts[0]

    def parameters(self) -> list[nn.Parameter]:
        """All parameters of this rank."""
        return [p for part in self.parts for p in part.parameters()]

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Around each micro-batch's forward and backward; gradients are joined in the last one of a step."""
        if isinstance(self.forward, FSDPModule):
            self.forward.set_requires_gradient_sync(last)
        if last or not isinstance(self.forward, DistributedDataParallel):
            return nullcontext()
        return self.forward.no_sync()

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Join what no wrapper has joined; call it after a step's last backward, on every rank."""
        if self.mesh is None:
            return
        by_axis: dict[str, list[Tensor]] = {}
        for part in self.parts:
            inside = {id(p) for m in part.modules() if isinstance(m, MoE) for p in m.parameters()}
            for p in part.parameters():
                for axis in self._left(p, id(p) in inside):
                    if self.mesh[axis].size > 1:
                        by_axis.setdefault(axis, []).append(_local_gradient(p))
        for axis, grads in by_axis.items():
            for work in [dist.all_reduce(grad, group=self.mesh[axis].group, async_op=True) for grad in grads]:
                work.wait()

    def _left(self, parameter: nn.Parameter, in_moe: bool) -> list[str]:
        """The axes over which a parameter's gradient is still in parts."""
        assert self.mesh is not None
        degrees = self.mesh.degrees
        dims = set(parameter.device_mesh.mesh_dim_names or ()) if isinstance(parameter, DTensor) else set()
        sharded = degrees.data_parallel == "fsdp"
        if dims & _EXPERT:
            return [] if sharded else ["edp"]
        data = [] if sharded or id(parameter) in self._joined_by_ddp else ["dense"]
        sees_own_tokens = "tp" not in dims and (degrees.sequence_parallel or in_moe)
        return [*data, "tp"] if sees_own_tokens else data

    def _wrap(self, model: nn.Module, mesh: Mesh) -> DistributedDataParallel:
        plain = {name for name, p in model.named_parameters() if not isinstance(p, DTensor)}
        self._joined_by_ddp = {id(p) for name, p in model.named_parameters() if name in plain}
        # buffers here are constants
        ignored = [name for name, _ in (*model.named_parameters(), *model.named_buffers()) if name not in plain]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
        # Looking for unused parameters keeps DDP from rearranging its buckets after the first step. A ring sums an
        # element in an order that depends on its place, so a resumed run would differ in the last bit.
        group = mesh["dense"].group
        wrapped = DistributedDataParallel(
            model, process_group=group, gradient_as_bucket_view=True, find_unused_parameters=True
        )
        # torch refuses a hook with annotations that are strings, as all are in this file
        wrapped.register_comm_hook(group, lambda group, bucket: _add_up(group, bucket.buffer()))
        return wrapped


def _add_up(group: Any, flat: Tensor) -> torch.futures.Future[Tensor]:
    future = dist.all_reduce(flat, group=group, async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def _local_gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:  # every rank must join the same collectives
        parameter.grad = torch.zeros_like(parameter)
    grad = parameter.grad
    return grad.to_local() if isinstance(grad, DTensor) else grad
