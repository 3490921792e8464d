"""Expert parallelism: each rank of the ep axis owns num_experts / ep experts; those of the etp axis a part of each."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ..dispatch import AllToAllDispatcher
from ..layer import MoE
from .mesh import Mesh


def apply_expert_parallel(layer: MoE, mesh: Mesh) -> None:
    """Keep this rank's part of the experts of a layer whose full weights are the same on all ranks.

    The weights become DTensors, so that norms, optimizers and checkpoints know what is split.
    """
    config = layer.config
    if config.num_experts % mesh["ep"].size:
        raise ValueError(f"model.num_experts={config.num_experts}: must be divisible by parallel.ep={mesh['ep'].size}")
    layer.dispatcher = AllToAllDispatcher(config.num_experts, mesh["ep"], config.backend)
    placements = (Shard(0), Replicate())
    for name, weight in list(layer.experts.named_parameters(recurse=False)):
        own = weight.detach().chunk(mesh["ep"].size)[mesh["ep"].rank].clone()
        split = DTensor.from_local(own, mesh.expert["ep"], (Shard(0),), run_check=False)
        layer.experts.register_parameter(name, nn.Parameter(split, requires_grad=weight.requires_grad))
