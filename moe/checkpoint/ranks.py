"""The collectives that checkpoints need. Without a process group, each of them is the identity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")

Group = dist.ProcessGroup | None


def distributed() -> bool:
    """Return whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return this process's rank."""
    return dist.get_rank() if distributed() else 0


def gather(value: T, group: Group = None) -> list[T]:
    """Return the values of all ranks. Every rank must call this."""
    if not distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


def divide(value: T, work: Callable[[list[T]], Sequence[Any]], group: Group = None) -> Any:
    """Let rank 0 compute one result for each rank from the values of all ranks, and return this rank's result.

    Every rank must call this. An exception on rank 0 is raised on every rank.
    """
    if not distributed():
        return work([value])[0]
    first, world = rank() == 0, dist.get_world_size()
    values: list[Any] | None = [None] * world if first else None
    dist.gather_object(value, values, dst=0, group=group)
    results: list[Any] | None = None
    if values is not None:
        try:
            results = list(work(values))
        except Exception as error:
            results = [error] * world
    own: list[Any] = [None]
    dist.scatter_object_list(own, results, src=0, group=group)
    if isinstance(own[0], Exception):
        raise own[0]
    return own[0]
