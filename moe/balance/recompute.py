"""Activation checkpointing that never routes twice.

``torch.utils.checkpoint`` runs a region again in the backward, and a layer recognises that. While one micro-batch is in
flight, the layer knows which one is recomputed and repeats its decision; among several it routes the same input again.
:func:`recompute` makes the match exact for any number.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

from torch.utils.checkpoint import checkpoint

from ..collectives import Kept, keeping
from .step import Layer, Step
from .visit import Visit


class _Region:
    """The visits of a region's forward, in order, and how far its recomputation has come."""

    def __init__(self, keep_exchanges: bool) -> None:
        #: the region around it
        self.parent = _region.get()
        self.visits: list[Visit] = []
        self.next: int | None = None
        self.kept = Kept() if keep_exchanges else None


class _Within:
    """Makes a region the current one, each time it is entered (a graph may be walked backward twice)."""

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
    """Like ``torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)``, keeping routing decisions.

    ``keep_exchanges`` also keeps what came from other ranks, dispatched rows and results, so that the recomputation
    communicates nothing: memory of about 2 K rows per token for a third of the layer's exchanges (DeepSpeed-TED,
    arXiv 2303.06318).
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        region = _Region(keep_exchanges)
        return _Within(region, replay=False), _Within(region, replay=True)

    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


def visit_being_recomputed(step: Step, layer: Layer) -> tuple[Visit | None, bool]:
    """The visit whose forward now runs again, and whether we are certain that it is this one.

    (None, False) when the forward is a first one.
    """
    region = _region.get()
    while region is not None:
        if region.next is not None:
            region.next += 1
            return region.visits[region.next - 1], True
        region = region.parent
    return step.recomputed(layer)


def remember(visit: Visit) -> None:
    """Note a visit for the recomputation of the regions that it runs in."""
    region = _region.get()
    while region is not None and region.next is None:
        region.visits.append(visit)
        region = region.parent
