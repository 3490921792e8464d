"""Dispatchers: send tokens to the ranks of their experts, and combine the results."""

from collections.abc import Callable
from functools import partial

from ..config import MoEConfig
from ..placement import Placement
from .all_gather import AllGatherDispatcher
from .all_to_all import AllToAllDispatcher, OverlappedDispatcher
from .base import Dispatcher
from .budgeted import Budget, BudgetedDispatcher, OverBudgetError
from .capacity import Capacity, build_capacity
from .deepep import deepep
from .duplicates import DropDuplicates
from .hierarchical import HierarchicalDispatcher, node_size
from .local import LocalDispatcher

#: all take the arguments of :class:`Dispatcher`
DISPATCHERS: dict[str, Callable[..., Dispatcher]] = {
    "local": LocalDispatcher,
    "all_gather": AllGatherDispatcher,
    "all_to_all": AllToAllDispatcher,
    "hierarchical": HierarchicalDispatcher,
    "overlapped": OverlappedDispatcher,
    "deepep": deepep,
}


def build_dispatcher(config: MoEConfig, placement: Placement) -> Dispatcher:
    """Build the dispatcher that ``config.dispatch`` names, for the ranks of ``placement``."""
    ep, owners = placement.ep, placement.owners_of(config.num_experts)
    build = DISPATCHERS[config.dispatch.name if ep.size > 1 else "local"]
    if config.dispatch.memory_mb is not None and ep.size > 1:
        build = partial(BudgetedDispatcher, budget=Budget.of(config, placement.etp.size))
    return build(owners, ep, config.backend, etp=placement.etp, config=config.dispatch, capacity=config.capacity)


__all__ = [
    "DISPATCHERS",
    "AllGatherDispatcher",
    "AllToAllDispatcher",
    "BudgetedDispatcher",
    "Capacity",
    "Dispatcher",
    "DropDuplicates",
    "HierarchicalDispatcher",
    "LocalDispatcher",
    "OverBudgetError",
    "OverlappedDispatcher",
    "build_capacity",
    "build_dispatcher",
    "node_size",
]
