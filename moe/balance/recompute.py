"""Activation checkpointing that never routes twice.

``torch.utils.checkpoint`` runs a region again in the backward. While one micro-batch is in flight, a layer knows which
visit is recomputed, and repeats its routing decision; among several it routes the same input again. :func:`recompute`
finds the visit with certainty for any number of micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..collectives import Kept, keeping
from .hooks import break_graph
from .step import LayerStep, Step
from .visit import Visit

#: what the error of ``fullgraph=True`` says
_NO_GRAPH = (
    "recompute: a graph cannot repeat routing decisions; do not recompute (recompute_blocks=False), as the compiler "
    "decides by itself what to keep for the backward, or leave out fullgraph=True"
)


class _Region:
    """The visits of a checkpointed region, in order. Entered for the forward and again for each recomputation."""

    def __init__(self, keep_exchanges: bool) -> None:
        #: the region around this one
        self.parent = _region.get()
        self.visits: list[Visit] = []
        #: index of the next visit to recompute; None in the forward
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
    """Like ``torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)``, but keep routing decisions.

    ``keep_exchanges`` also keeps the rows received from other ranks, so that recomputation needs no communication. It
    saves a third of the layer's exchanges, at a cost of about 2 K rows of memory per token (DeepSpeed-TED, arXiv
    2303.06318).

    ``torch.compile`` breaks the graph here, and leaves out what the function computes.
    """
    if torch.compiler.is_compiling():
        if not torch.is_grad_enabled():
            return function(*args)
        break_graph(_NO_GRAPH)
    return _checkpointed(function, args, keep_exchanges)


def _checkpointed_eagerly(function: Callable[..., Any], args: tuple[Any, ...], keep_exchanges: bool) -> Any:
    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        region = _Region(keep_exchanges)
        return region, region

    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


_checkpointed = torch._disable_dynamo(_checkpointed_eagerly)


def visit_being_recomputed(step: Step, layer: LayerStep) -> tuple[Visit | None, bool]:
    """Return the visit that the current forward recomputes, and whether that is certain.

    (None, False) if the forward recomputes nothing.
    """
    region = _region.get()
    while region is not None:
        if region.next is not None:
            region.next += 1
            return region.visits[region.next - 1], True
        region = region.parent
    return step.recomputed(layer)


def remember(visit: Visit) -> None:
    """Record a visit in the regions around it, for their recomputation."""
    region = _region.get()
    while region is not None and region.next is None:
        region.visits.append(visit)
        region = region.parent
