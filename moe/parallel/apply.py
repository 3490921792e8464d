"""From a plain model to a parallel one, from outside."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..collectives import world_axis
from ..layer import MoE
from .expert import apply_expert_parallel


def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Split the experts of every MoE layer over the mesh's "ep" axis, in place.

    ``mesh`` comes from :func:`equimoe.moe.parallel.build_mesh`. The model's weights must be the same on all ranks (same
    seed). All ranks hold different tokens, so loads are counted over all of them. Data parallelism comes after:
    :class:`equimoe.moe.engines.DataParallel`, or DDP with the expert parameters left to you.
    """
    for layer in (module for module in model.modules() if isinstance(module, MoE)):
        layer.balancer.axis = world_axis()
        if mesh["ep"].size() > 1:
            apply_expert_parallel(layer, mesh["ep"])
    return model
