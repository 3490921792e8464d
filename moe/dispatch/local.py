"""Dispatch for one rank that owns all experts: nothing is sent.  T tokens, D hidden."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..types import Experts, Routing
from .base import Dispatcher, as_computed


class LocalDispatcher(Dispatcher):
    """Passes tokens to the experts as source rows; the experts' kernel gathers them.

    Raises ValueError if the experts are distributed over several ranks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.axis.size > 1:
            raise ValueError(f"dispatch.name='local': experts are on {self.axis.size} ranks; use 'all_to_all'")

    def send(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
        x_TD = as_computed(x_TD) if self.etp.size > 1 else x_TD
        return x_TD, routing.weights_TK, self.holders.to_slots(routing.ids_TK)

    def finish(self, flight: tuple[Tensor, Tensor, Tensor], experts: Experts) -> Tensor:
        return self.compute(*flight, experts, self.sizes_of)
