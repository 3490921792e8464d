"""The ranks as a mesh. Expert axes: edp (replicas of an expert), ep (experts split), over the same ranks as dp."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


def check_degrees(world: int, ep: int, num_experts: int) -> None:
    """Refuse degrees that do not fit, in one line that names them."""
    if ep < 1 or world % ep:
        raise ValueError(f"parallel.ep={ep}: must divide the number of processes, which is {world}")
    if num_experts % ep:
        raise ValueError(f"model.num_experts={num_experts}: must be divisible by parallel.ep={ep}")


def build_mesh(ep: int, device_type: str = "cpu", timeout_s: float = 300.0) -> DeviceMesh:
    """A mesh (edp, ep) over all ranks, ranks of one ep group adjacent; every group has the timeout and has been used.

    A communicator made on first use can fail, or hang, in the middle of a run; here it fails at the start.
    """
    world = dist.get_world_size()
    check_degrees(world, ep, num_experts=ep)
    ranks = torch.arange(world).view(world // ep, ep)
    timeout = timedelta(seconds=timeout_s)
    mine = {}
    for name, rows in (("edp", ranks.T.tolist()), ("ep", ranks.tolist())):
        for row in rows:
            group = dist.new_group(row, timeout=timeout)
            if dist.get_rank() in row:
                mine[name] = group
    for group in (*mine.values(), dist.group.WORLD):
        dist.all_reduce(torch.zeros(1, device=device_type), group=group)
    return DeviceMesh.from_group(list(mine.values()), device_type, mesh=ranks, mesh_dim_names=("edp", "ep"))
