"""All groups of ranks, made in one place from the degrees.

Ranks are numbered with the pipeline outermost and tensor parallelism innermost, so that the axes which talk most stay
inside a node, and every stage has the same dense and expert axes. The experts' axes fold over the dense ones freely:
expert parallelism may be larger than data parallelism and span tensor and context parallel ranks (arXiv 2504.14960;
the listing in its appendix, where the pipeline is not outermost, breaks unless cp * tp = ep * etp).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..collectives import Axis
from .config import ParallelConfig

DENSE = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
EXPERT = ("pp", "edp_replicate", "edp_shard", "ep", "etp")

#: axis -> the grid and the dimensions of it that it runs over
AXES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "pp": (DENSE, ("pp",)),
    # ranks that hold different sequences; parts of the same sequences; any different tokens under sequence parallelism
    "dp": (DENSE, ("dp_replicate", "dp_shard")),
    "cp": (DENSE, ("cp",)),
    "tp": (DENSE, ("tp",)),
    "sequence": (DENSE, ("cp", "tp")),
    "stage": (DENSE, ("dp_replicate", "dp_shard", "cp", "tp")),
    # dense weights: replicas, and the ranks that FSDP splits them over; together, those whose gradients are added up
    "dp_replicate": (DENSE, ("dp_replicate",)),
    "fsdp": (DENSE, ("dp_shard", "cp")),
    "dense": (DENSE, ("dp_replicate", "dp_shard", "cp")),
    "edp_replicate": (EXPERT, ("edp_replicate",)),
    "edp_shard": (EXPERT, ("edp_shard",)),
    "edp": (EXPERT, ("edp_replicate", "edp_shard")),
    "ep": (EXPERT, ("ep",)),
    "etp": (EXPERT, ("etp",)),
}


def sizes(degrees: ParallelConfig) -> dict[str, int]:
    """The length of each dimension of both grids, for resolved degrees."""
    found = {name: getattr(degrees, name) for name in (*DENSE, "ep", "etp")}
    # replicas of the experts follow those of the dense part as far as there are that many
    found["edp_replicate"] = math.gcd(degrees.dp_replicate, degrees.edp)
    found["edp_shard"] = degrees.edp // found["edp_replicate"]
    return found


def groups_of(axis: str, degrees: ParallelConfig) -> Tensor:
    """int64 [groups, ranks of a group] for resolved degrees; each rank is in one group."""
    grid, along = AXES[axis]
    lengths = sizes(degrees)
    ranks = torch.arange(math.prod(lengths[name] for name in grid)).view([lengths[name] for name in grid])
    kept = [i for i, name in enumerate(grid) if name not in along]
    ranks = ranks.permute(*kept, *(grid.index(name) for name in along))
    return ranks.reshape(-1, math.prod(lengths[name] for name in along))


@dataclass(frozen=True)
class Mesh:
    """This rank's place: the resolved degrees, its group along every axis, and the meshes that DTensors live on."""

    degrees: ParallelConfig
    axes: Mapping[str, Axis]
    #: (pp, dp_replicate, fsdp, tp)
    dense: DeviceMesh
    #: (pp, edp_replicate, edp_shard, ep, etp)
    expert: DeviceMesh

    def __getitem__(self, axis: str) -> Axis:
        return self.axes[axis]


def build_mesh(config: ParallelConfig, device_type: str = "cpu", warm_up: bool = True) -> Mesh:
    """Make every group that the degrees ask for, with the configured timeout, and use each once.

    A communicator made on first use can fail, or hang, in the middle of a run; here it fails at the start. Every rank
    calls it. Raises ValueError for degrees that do not fit the number of processes.
    """
    rank, degrees = dist.get_rank(), config.resolve(dist.get_world_size())
    timeout = timedelta(seconds=config.timeout_s)
    made: dict[tuple[int, ...], Any] = {}
    handles, axes = {}, {}
    for name in AXES:
        table = groups_of(name, degrees)
        ranks = tuple(table[(table == rank).any(1)][0].tolist())
        if ranks not in made:  # rows of one axis are shifted copies, so all ranks find the same axes equal
            made[ranks] = dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)
        handles[name] = made[ranks]
        single = len(ranks) == 1
        axes[name] = Axis(name) if single else Axis(name, made[ranks], len(ranks), ranks.index(rank))
    if warm_up:
        for ranks, group in made.items():
            if len(ranks) > 1:
                dist.all_reduce(torch.zeros(1, device=device_type), group=group)
    lengths = sizes(degrees)

    def device_mesh(names: tuple[str, ...]) -> DeviceMesh:
        length = lengths | {"fsdp": degrees.dp_shard * degrees.cp}
        shape = [length[name] for name in names]
        ranks = torch.arange(math.prod(shape)).view(shape)
        return DeviceMesh.from_group([handles[name] for name in names], device_type, mesh=ranks, mesh_dim_names=names)

    return Mesh(degrees, axes, device_mesh(("pp", "dp_replicate", "fsdp", "tp")), device_mesh(EXPERT))
