"""Named axes of ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Axis:
    """The ranks along one dimension of the mesh, as this rank sees them."""

    name: str
    group: Any = None
    size: int = 1
    rank: int = 0

    def __deepcopy__(self, memo: dict) -> Axis:
        return self  # a copied layer communicates with the same ranks, and process groups cannot be copied


#: this rank alone
LOCAL = Axis("local")


def axis_of(name: str, group: Any) -> Axis:
    """Return the axis of a process group; a group of one rank gets no group, since it needs no communication.

    None is the default group, as in torch.
    """
    group = dist.group.WORLD if group is None else group
    size = dist.get_world_size(group)
    return Axis(name, group, size, dist.get_rank(group)) if size > 1 else Axis(name)


def world_axis() -> Axis:
    """Return the axis of all ranks of the default process group; LOCAL if there is none."""
    if dist.is_available() and dist.is_initialized():
        return axis_of("world", dist.group.WORLD)
    return LOCAL


def global_ranks(axis: Axis) -> list[int]:
    """Return the axis's ranks, numbered as in the default process group."""
    return dist.get_process_group_ranks(axis.group) if axis.size > 1 else [0]


def private_axis(axis: Axis) -> Axis:
    """Return an axis of the same ranks with a new process group, whose collectives cannot mix with those of others.

    All ranks of the axis must call this.
    """
    if axis.size == 1 or dist.get_backend(axis.group) == "fake":
        return axis
    return replace(axis, group=_new_group_like(axis.group, global_ranks(axis)))


_halves: dict[tuple[Any, int], tuple[Axis, Axis]] = {}


def device_of(axis: Axis) -> torch.device:
    """Return the device on which the axis's backend communicates; prefers a GPU."""
    # a gloo group lists every device type, also unavailable ones
    usable = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    known = [kind for kind in axis.group._device_types if kind.type in usable]
    return next((kind for kind in known if kind.type == "cuda"), known[0])


def _new_group_like(group: Any, members: list[int]) -> Any:
    """Create a group of ``members``, a subset of a group's ranks, with the group's timeout, and use it once.

    All members must call this.
    """
    device = device_of(Axis("", group))
    options = getattr(group._get_backend(device), "options", None)
    made = dist.new_group(members, timeout=getattr(options, "_timeout", None), use_local_synchronization=True)
    dist.all_reduce(torch.zeros(1, device=device), group=made)
    return made


def split_axis(axis: Axis, inner: int) -> tuple[Axis, Axis]:
    """Divide an axis into blocks of ``inner`` adjacent ranks; return the axis across blocks and that within a block.

    All ranks of the axis must call this. Raises ValueError if ``inner`` does not divide the size.
    """
    if inner < 1 or axis.size % inner:
        raise ValueError(f"inner={inner}: must divide the size of axis {axis.name!r}, {axis.size}; use a divisor")
    if (axis.group, inner) not in _halves:
        ranks, block = global_ranks(axis), axis.rank // inner
        lengths = {"across": ranks[axis.rank % inner :: inner], "within": ranks[block * inner : (block + 1) * inner]}
        made = []
        for name, members in lengths.items():
            group = None
            if len(members) == axis.size:
                group = axis.group
            elif len(members) > 1:
                group = _new_group_like(axis.group, members)
            made.append(Axis(name) if len(members) == 1 else axis_of(name, group))
        _halves[axis.group, inner] = (made[0], made[1])
    across, within = _halves[axis.group, inner]
    return replace(across, name=f"{axis.name}.across"), replace(within, name=f"{axis.name}.within")
