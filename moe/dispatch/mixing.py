"""Sends mixtures of tokens to the experts instead of tokens (SoftMoE, arXiv 2308.00951).

B sequences, S tokens per sequence, X slots, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..types import Experts, Routing
from .base import Dispatcher, Holders


class MixingDispatcher:
    """Mixes tokens into slots, which ``inner`` dispatches like tokens, and mixes the experts' results into tokens."""

    def __init__(self, inner: Dispatcher) -> None:
        self.inner = inner

    def address(self, holders: Holders) -> None:
        """See :meth:`Dispatcher.address`."""
        self.inner.address(holders)

    def send(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Any]:
        """See :meth:`Dispatcher.send`; the routing is that of the slots."""
        assert routing.mixing is not None
        dispatch_BSX, combine_BSX = routing.mixing
        x_BSD = x_TD.unflatten(0, dispatch_BSX.shape[:2])
        slots_BXD = torch.bmm(dispatch_BSX.mT.to(x_TD.dtype), x_BSD)
        return combine_BSX, self.inner.send(slots_BXD.flatten(0, 1), routing)

    def finish(self, flight: tuple[Tensor, Any], experts: Experts) -> Tensor:
        """See :meth:`Dispatcher.finish`."""
        combine_BSX, inner = flight
        y_BXD = self.inner.finish(inner, experts).unflatten(0, (len(combine_BSX), -1))
        return torch.bmm(combine_BSX.to(y_BXD.dtype), y_BXD).flatten(0, 1)
