"""Activation checkpointing that never routes twice.

``torch.utils.checkpoint`` runs a region again in the backward. A layer recognises that by itself. As long as one
micro-batch is in flight it knows which one is computed again, and takes its decision as it was; among several it
routes alike from the same input. :func:`recompute` makes the match exact for any number.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..collectives import Kept, keeping
from .counts import MicroBatch, Window


class _Region:
    """The slots that a region's forward opened, in order, how far its recomputation has come, and what is kept of its
    communication."""

    def __init__(self, keep_exchanges: bool) -> None:
        #: the region around it
        self.parent = _region.get()
        self.slots: list[MicroBatch] = []
        self.next: int | None = None
        self.kept = Kept() if keep_exchanges else None


class _Within:
    """Makes a region the current one, as often as it is entered (a graph may be walked backward twice)."""

    def __init__(self, region: _Region, replay: bool) -> None:
        self.region, self.replay = region, replay

    def __enter__(self) -> None:
        self.region.next = 0 if self.replay else None
        if self.region.kept is not None:
            self.region.kept.next = self.region.next
        self.tokens = _region.set(self.region), keeping.set(self.region.kept)

    def __exit__(self, *error: object) -> None:
        _region.reset(self.tokens[0])
        keeping.reset(self.tokens[1])


_region: ContextVar[_Region | None] = ContextVar("equimoe_recompute_region", default=None)


def recompute(function: Callable[..., Any], *args: Any, keep_exchanges: bool = False) -> Any:
    """Like ``torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)``, routing decisions kept.

    ``keep_exchanges`` also keeps what came from other ranks, dispatched rows and results, so that the recomputation
    communicates nothing: memory of about 2 K rows per token for a third of the layer's exchanges (DeepSpeed-TED,
    arXiv 2303.06318).
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        region = _Region(keep_exchanges)
        return _Within(region, replay=False), _Within(region, replay=True)

    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


def slot_being_recomputed(window: Window) -> tuple[MicroBatch | None, bool]:
    """The slot whose forward is now run again, and whether its decision is known to be this pass's.

    (None, False) when the pass is a first one.
    """
    region = _region.get()
    while region is not None:
        if region.next is not None:
            region.next += 1
            return region.slots[region.next - 1], True
        region = region.parent
    backward = torch._C._current_graph_task_id()
    if backward == -1:
        return None, False
    # Inside a backward only a checkpointed region runs forward. If torch's non-reentrant kind, the slot is open, or
    # this very backward has just used it; the reentrant kind's first pass had no gradient and was not counted, and
    # what its second opens is none of this backward's to compute again. Which of several slots it is nobody knows,
    # nor whether one that another backward opened was left behind by an exception.
    in_flight = [slot for slot in window.known if not (slot.done or slot.ahead or slot.opened_in == backward)]
    last = window.last_used
    if last is not None and last.backward_id == backward:
        return last, not in_flight
    return (in_flight[0], len(in_flight) == 1 and in_flight[0].opened_in == -1) if in_flight else (None, False)


def remember(slot: MicroBatch) -> None:
    """Note the slot of a pass for the recomputation of the regions that it runs in."""
    region = _region.get()
    while region is not None and region.next is None:
        region.slots.append(slot)
        region = region.parent
