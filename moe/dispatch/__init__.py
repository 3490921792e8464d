"""Dispatchers: send tokens to the ranks of their experts, and combine the results."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from ..config import MoEConfig
from ..placement import Owners, Placement
from .all_gather import AllGatherDispatcher
from .all_to_all import AllToAllDispatcher, OverlappedDispatcher
from .base import Dispatcher
from .budgeted import Budget, BudgetedDispatcher, OverBudgetError
from .capacity import Capacity, build_capacity
from .deepep import deepep
from .duplicates import DropDuplicates
from .hierarchical import HierarchicalDispatcher, node_size
from .local import LocalDispatcher
from .mixing import MixingDispatcher

#: all take the arguments of :class:`Dispatcher`
DISPATCHERS: dict[str, Callable[..., Dispatcher]] = {
    "local": LocalDispatcher,
    "all_gather": AllGatherDispatcher,
    "all_to_all": AllToAllDispatcher,
    "hierarchical": HierarchicalDispatcher,
    "overlapped": OverlappedDispatcher,
    "deepep": deepep,
}


def build_dispatcher(config: MoEConfig, placement: Placement) -> Dispatcher | MixingDispatcher:
    """Build the dispatcher that ``config.dispatch`` names, for the ranks of ``placement``.

    Raises ValueError if the router mixes the tokens of whole sequences, of which each rank has a part.
    """
    ep, owners = placement.ep, placement.owners_of(config.num_experts)
    build = DISPATCHERS[config.dispatch.name if ep.size > 1 else "local"]
    if config.dispatch.memory_mb is not None and ep.size > 1:
        build = partial(BudgetedDispatcher, budget=Budget.of(config, placement.etp.size))
    more: dict[str, Any] = {"etp": placement.etp, "config": config.dispatch, "capacity": config.capacity}
    made = build(owners, ep, config.backend, **more, even=chooses_evenly(config, owners))
    if config.router.gate != "slots":
        return made
    if placement.sequence.size * placement.copies.size > 1:
        raise ValueError(
            "router.gate='slots': mixes the tokens of whole sequences, but ranks hold parts of them; set parallel.cp=1 "
            "and parallel.tp=1"
        )
    return MixingDispatcher(made)


def chooses_evenly(config: MoEConfig, owners: Owners) -> bool:
    """Return whether every token has equally many choices on each rank, and all ranks have equally many tokens.

    Each rank must own as many whole groups of experts (MoGE, arXiv 2505.21411).
    """
    groups = config.router.groups
    if config.router.select != "each_group" or groups % owners.ranks or not config.dispatch.equal_tokens:
        return False
    size, owned = config.num_experts // groups, Counter[int]()
    for g in range(groups):
        ranks = set(owners.rank_of_E[g * size : (g + 1) * size])
        if len(ranks) > 1:
            return False
        owned.update(ranks)
    return set(owned.values()) == {groups // owners.ranks}


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
    "MixingDispatcher",
    "OverBudgetError",
    "OverlappedDispatcher",
    "build_capacity",
    "build_dispatcher",
    "node_size",
]
