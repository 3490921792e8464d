"""Creates all process groups of a run from the parallelism degrees.

The pipeline is the outermost axis and tensor parallelism the innermost, so that the axes that communicate most stay
inside a node and every stage has the same dense and expert axes. Expert axes are independent of dense axes: ep may be
larger than dp and span tp and cp ranks (arXiv 2504.14960; the listing in that paper's appendix does not put the
pipeline outermost, and breaks unless cp * tp = ep * etp).
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
from .degrees import DENSE_DEGREES, ParallelConfig

#: dimensions of the two grids of ranks, outermost first
DENSE_GRID = DENSE_DEGREES
EXPERT_GRID = ("pp", "edp_replicate", "edp_shard", "ep", "etp")

#: axis -> the grid that it belongs to, and the dimensions of that grid that it spans
AXES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "pp": (DENSE_GRID, ("pp",)),
    # dp: different sequences; cp: parts of the same sequences; stage: different tokens, if tp is sequence-parallel
    "dp": (DENSE_GRID, ("dp_replicate", "dp_shard")),
    "cp": (DENSE_GRID, ("cp",)),
    "tp": (DENSE_GRID, ("tp",)),
    "sequence": (DENSE_GRID, ("cp", "tp")),
    "stage": (DENSE_GRID, ("dp_replicate", "dp_shard", "cp", "tp")),
    # dp_replicate: replicas of dense weights; fsdp: ranks that shard them; dense: both, to sum gradients over
    "dp_replicate": (DENSE_GRID, ("dp_replicate",)),
    "fsdp": (DENSE_GRID, ("dp_shard", "cp")),
    "dense": (DENSE_GRID, ("dp_replicate", "dp_shard", "cp")),
    "edp_replicate": (EXPERT_GRID, ("edp_replicate",)),
    "edp_shard": (EXPERT_GRID, ("edp_shard",)),
    "edp": (EXPERT_GRID, ("edp_replicate", "edp_shard")),
    "ep": (EXPERT_GRID, ("ep",)),
    "etp": (EXPERT_GRID, ("etp",)),
}


def sizes(degrees: ParallelConfig) -> dict[str, int]:
    """Return the length of every dimension of both grids. The degrees must be resolved."""
    found = {name: getattr(degrees, name) for name in (*DENSE_GRID, "ep", "etp")}
    # replicas of experts coincide with replicas of dense weights as far as edp allows
    found["edp_replicate"] = math.gcd(degrees.dp_replicate, degrees.edp)
    found["edp_shard"] = degrees.edp // found["edp_replicate"]
    return found


def groups_of(axis: str, degrees: ParallelConfig) -> Tensor:
    """Return the groups of an axis, int64 [groups, ranks per group]. The degrees must be resolved.

    Each rank is in exactly one group.
    """
    grid, along = AXES[axis]
    lengths = sizes(degrees)
    ranks = torch.arange(math.prod(lengths[name] for name in grid)).view([lengths[name] for name in grid])
    kept = [i for i, name in enumerate(grid) if name not in along]
    ranks = ranks.permute(*kept, *(grid.index(name) for name in along))
    return ranks.reshape(-1, math.prod(lengths[name] for name in along))


@dataclass(frozen=True)
class Mesh:
    """The resolved degrees, this rank's group along every axis, and the device meshes for DTensors."""

    degrees: ParallelConfig
    axes: Mapping[str, Axis]
    #: (pp, dp_replicate, fsdp, tp)
    dense: DeviceMesh
    #: (pp, edp_replicate, edp_shard, ep, etp)
    expert: DeviceMesh

    def __getitem__(self, axis: str) -> Axis:
        return self.axes[axis]


def build_mesh(config: ParallelConfig, device_type: str = "cpu", warm_up: bool = True) -> Mesh:
    """Create all process groups with the configured timeout, and (``warm_up``) run one collective in each.

    Backends create a communicator on first use, which can fail or hang in the middle of a run; the warm-up makes it
    fail at the start. Every rank must call this. Raises ValueError for degrees that do not fit the number of processes.
    """
    rank, degrees = dist.get_rank(), config.resolve(dist.get_world_size())
    timeout = timedelta(seconds=config.timeout_s)
    made: dict[tuple[int, ...], Any] = {}
    handles, axes = {}, {}
    for name in AXES:
        table = groups_of(name, degrees)
        ranks = tuple(table[(table == rank).any(1)][0].tolist())
        if ranks not in made:  # if two axes have equal groups on one rank, they do on all
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

    return Mesh(degrees, axes, device_mesh(("pp", "dp_replicate", "fsdp", "tp")), device_mesh(EXPERT_GRID))
