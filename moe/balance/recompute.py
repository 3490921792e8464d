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
    """The visits of a region, in order. It is entered for its forward and then for each recomputation, of which there
    are several where a graph is walked backward again."""

    def __init__(self, keep_exchanges: bool) -> None:
        #: the region around it
        self.parent = _region.get()
        self.visits: list[Visit] = []
        #: how far its recomputation has come; None in its forward
        self.next: int | None = None
        self.kept = Kept() if keep_exchanges else None
        self._recorded = False

    def __enter__(self) -> None:
        self.next = 0 if self._recorded else None
        if self.kept is not None:
            self.kept.next = self.next
        self._tokens = _region.set(self), keeping.set(self.kept)

    def __exit__(self, *error: object) -> None:
        self._recorded = True
        _region.reset(self._tokens[0])
        keeping.reset(self._tokens[1])


_region: ContextVar[_Region | None] = ContextVar("equimoe_recompute_region", default=None)


def recompute(function: Callable[..., Any], *args: Any, keep_exchanges: bool = False) -> Any:
    """Like ``torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)``, keeping routing decisions.

    ``keep_exchanges`` also keeps what came from other ranks, dispatched rows and results, so that the recomputation
    communicates nothing: memory of about 2 K rows per token for a third of the layer's exchanges (DeepSpeed-TED,
    arXiv 2303.06318).
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        region = _Region(keep_exchanges)
        return region, region

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
