"""Data parallelism around a model with split experts, on torch's DistributedDataParallel.

Dense parameters are the same on all ranks and DDP averages their gradients over all of them. An expert's gradient
already holds the tokens of its whole ep group, which the exchange brought there; it is summed over the expert's
replicas (edp) and divided by the number of ranks, as the dense ones are, not by the number of replicas.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


class DataParallel:
    """Runs a model from :func:`equimoe.moe.parallel.parallelize` on every rank's own tokens.

    >>> engine = DataParallel(model, mesh)
    >>> for i, batch in enumerate(micro_batches):
    ...     with engine.accumulate(last=i + 1 == len(micro_batches)):
    ...         loss(engine(batch)).backward()
    >>> engine.reduce_expert_gradients()
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh | None) -> None:
        self.model = model
        self.mesh = mesh
        self.ranks = 1 if mesh is None else mesh.size()
        self.split = [p for p in model.parameters() if isinstance(p, DTensor)]
        self.forward: Any = model
        if self.ranks > 1:
            split = {id(p) for p in self.split}
            # buffers here are constants
            ignored = [name for name, p in model.named_parameters() if id(p) in split]
            ignored += [name for name, _ in model.named_buffers()]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
            # Looking for unused parameters keeps DDP from rearranging its buckets after the first step. A ring sums an
            # element in an order that depends on its place, so a resumed run would differ in the last bit.
            self.forward = DistributedDataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=True)

    def __call__(self, *args: Any) -> Any:
        return self.forward(*args)

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Around each micro-batch's forward and backward; gradients are joined in the last one of a step."""
        return nullcontext() if last or self.ranks == 1 else self.forward.no_sync()

    @torch.no_grad()
    def reduce_expert_gradients(self) -> None:
        """Join the split parameters' gradients over their replicas; call it after a step's last backward."""
        if self.ranks == 1 or not self.split:
            return
        assert self.mesh is not None
        grads = [_local_gradient(p) for p in self.split]
        if self.mesh["edp"].size() > 1:
            group = self.mesh["edp"].get_group()
            for work in [dist.all_reduce(grad, group=group, async_op=True) for grad in grads]:
                work.wait()
        torch._foreach_div_(grads, float(self.ranks))


def _local_gradient(parameter: DTensor) -> Tensor:
    if parameter.grad is None:  # every rank must join the same collectives
        parameter.grad = torch.zeros_like(parameter)
    return cast(DTensor, parameter.grad).to_local()
