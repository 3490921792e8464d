"""Gradients of a parallel model, joined over the ranks that hold copies of a weight.

Every rank's loss is its share of the whole, and gradients are sums over ranks. FSDP2 adds up those of the weights that
it splits, torch's DistributedDataParallel those of plain weights; what is left is added up here, once a step: split
weights without FSDP2, and weights whose copies on tensor-parallel ranks saw different tokens. An expert's gradient
already holds the tokens of its whole ep group, which the exchange brought there; only its replicas (edp) are joined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..attention import HeadNorm
from ..balance import counting_pass
from ..layer import MoE
from ..parallel import Mesh, Share, token_nats, vocabulary_parallel

_EXPERT = {"edp_replicate", "edp_shard", "ep", "etp"}


class DataParallel:
    """Runs a model from :func:`equimoe.moe.parallel.parallelize` on every rank's own tokens.

    >>> engine = DataParallel(model, mesh)
    >>> for i, batch in enumerate(micro_batches):
    ...     with engine.accumulate(last=i + 1 == len(micro_batches)):
    ...         (loss_sum(engine(batch)) / tokens_of_the_step).backward()
    >>> engine.reduce_gradients()

    or, for a language model, :meth:`gradients`. ``precision`` makes the context of every forward (autocast).
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        mesh: Mesh | None,
        precision: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.parts = [model] if isinstance(model, nn.Module) else list(model)
        self.mesh = mesh
        self.precision = precision
        self.forward: Any = self.parts[0]
        self._joined_by_ddp: set[int] = set()
        replicated = mesh is not None and mesh.degrees.data_parallel == "ddp" and mesh["dense"].size > 1
        if mesh is not None and replicated and isinstance(model, nn.Module):
            self.forward = self._wrap(model, mesh)

    def __call__(self, *args: Any) -> Any:
        return self.forward(*args)

    @property
    def model(self) -> nn.Module:
        """The model, or the first stage of this rank."""
        return self.parts[0]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """All parameters of this rank, by the names that they have in the whole model."""
        return {name: p for part in self.parts for name, p in part.named_parameters()}

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Around each micro-batch's forward and backward; gradients are joined in the last one of a step."""
        if isinstance(self.forward, FSDPModule):
            self.forward.set_requires_gradient_sync(last)
        if last or not isinstance(self.forward, DistributedDataParallel):
            return nullcontext()
        return self.forward.no_sync()

    def gradients(self, shares: list[Share], tokens: float, exact: bool = False) -> list[Tensor]:
        """Forward, backward and reduction over the micro-batches of a step; the nats [B, S] of each share.

        The loss is the sum over all shares of all ranks, over ``tokens``. ``exact`` counts loads in a pass ahead.
        """
        if exact:
            with counting_pass(), self.precision():
                for share in shares:
                    self.model(share.inputs, share.mask)
        found = []
        with vocabulary_parallel(self.mesh):
            for i, share in enumerate(shares):
                with self.accumulate(last=i + 1 == len(shares)):
                    with self.precision():
                        logits_BSV = self(share.inputs, share.mask)
                    nats_BS = token_nats(logits_BSV, share.labels)
                    (nats_BS.sum() / tokens).backward()
                found.append(nats_BS.detach())
        self.reduce_gradients()
        return found

    @property
    def at_once(self) -> int:
        """How many shares :meth:`evaluate` takes best."""
        return 1

    @torch.no_grad()
    def evaluate(self, shares: list[Share]) -> list[Tensor]:
        """The nats [B, S] of each share, forward only. Masks are not given to the layers."""
        with vocabulary_parallel(self.mesh), self.precision():
            return [token_nats(self.model(share.inputs), share.labels) for share in shares]

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Join what no wrapper has joined; call it after a step's last backward, on every rank."""
        if self.mesh is None:
            return
        by_axis: dict[str, list[Tensor]] = {}
        for part in self.parts:
            # layers whose copies on tensor-parallel ranks work on other tokens, or on other heads
            inside = {id(p) for m in part.modules() if isinstance(m, (MoE, HeadNorm)) for p in m.parameters()}
            for p in part.parameters():
                for axis in self._left(p, id(p) in inside):
                    if self.mesh[axis].size > 1:
                        by_axis.setdefault(axis, []).append(_local_gradient(p))
        for axis, grads in by_axis.items():
            for work in [dist.all_reduce(grad, group=self.mesh[axis].group, async_op=True) for grad in grads]:
                work.wait()

    def _left(self, parameter: nn.Parameter, sees_its_own: bool) -> list[str]:
        """The axes over which a parameter's gradient is still in parts."""
        assert self.mesh is not None
        degrees = self.mesh.degrees
        dims = set(parameter.device_mesh.mesh_dim_names or ()) if isinstance(parameter, DTensor) else set()
        sharded = degrees.data_parallel == "fsdp"
        if dims & _EXPERT:
            return [] if sharded else ["edp"]
        data = [] if sharded or id(parameter) in self._joined_by_ddp else ["dense"]
        partial = "tp" not in dims and (degrees.sequence_parallel or sees_its_own)
        return [*data, "tp"] if partial else data

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
