"""Expert parallelism: each rank of the axis owns num_experts / ep experts."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ..collectives import axis_of
from ..dispatch import AllToAllDispatcher
from ..layer import MoE


def apply_expert_parallel(layer: MoE, ep_mesh: DeviceMesh) -> None:
    """Keep this rank's experts of a layer whose full weights are the same on all ranks; exchange rows by all-to-all.

    The weights become DTensors split over experts, so that norms, optimizers and checkpoints know what is split.
    """
    axis = axis_of("ep", ep_mesh.get_group())
    layer.dispatcher = AllToAllDispatcher(layer.config.num_experts, axis, layer.config.backend)
    for name, weight in list(layer.experts.named_parameters(recurse=False)):
        own = weight.detach().chunk(ep_mesh.size())[ep_mesh.get_local_rank()].clone()
        split = DTensor.from_local(own, ep_mesh, (Shard(0),), run_check=False)
        layer.experts.register_parameter(name, nn.Parameter(split, requires_grad=weight.requires_grad))
