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
        return self  # a process group is a handle; a copied layer talks to the same ranks


#: this rank alone
LOCAL = Axis("local")


def axis_of(name: str, group: Any) -> Axis:
    """The axis of a process group; one rank needs no communication."""
    size = dist.get_world_size(group)
    return Axis(name, group, size, dist.get_rank(group)) if size > 1 else Axis(name)


def world_axis() -> Axis:
    """All ranks of the default process group, or this one alone when there is none."""
    if dist.is_available() and dist.is_initialized():
        return axis_of("world", dist.group.WORLD)
    return LOCAL


def global_ranks(axis: Axis) -> list[int]:
    """The axis's ranks as the default process group numbers them."""
    return dist.get_process_group_ranks(axis.group) if axis.size > 1 else [0]


_halves: dict[tuple[Any, int], tuple[Axis, Axis]] = {}


def _new_group_like(group: Any, members: list[int]) -> Any:
    """A group of some of a group's ranks with the same timeout, which has been used once: all of them call this."""
    # a gloo group names every device
    usable = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    known = [kind for kind in group._device_types if kind.type in usable]
    device = next((kind for kind in known if kind.type == "cuda"), known[0])
    options = getattr(group._get_backend(device), "options", None)
    made = dist.new_group(members, timeout=getattr(options, "_timeout", None), use_local_synchronization=True)
    dist.all_reduce(torch.zeros(1, device=device), group=made)
    return made


def separate(axis: Axis) -> Axis:
    """The same ranks with a communicator of their own: its collectives need no order relative to others'.

    All ranks of the axis call this.
    """
    return axis if axis.size == 1 else replace(axis, group=_new_group_like(axis.group, global_ranks(axis)))


def split_axis(axis: Axis, inner: int) -> tuple[Axis, Axis]:
    """The axis as a grid: (ranks ``inner`` apart, blocks of ``inner`` adjacent ranks). All its ranks call this.

    Raises ValueError when ``inner`` does not divide the size.
    """
    if inner < 1 or axis.size % inner:
        raise ValueError(f"split of axis {axis.name!r} into blocks of {inner}: must divide its {axis.size} ranks")
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
