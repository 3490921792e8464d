"""Bring tokens to the ranks of their experts, and results back."""

from typing import Protocol

from torch import Tensor

from ..types import DispatchPlan, Routing
from .all_to_all import AllToAllDispatcher
from .capacity import Capacity, Dropless
from .local import LocalDispatcher


class Dispatcher(Protocol):
    """The contract of a dispatcher: rows there, with a plan, and results back by that plan."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, DispatchPlan]: ...

    def combine(self, rows_SD: Tensor, plan: DispatchPlan) -> Tensor: ...


__all__ = ["AllToAllDispatcher", "Capacity", "Dispatcher", "Dropless", "LocalDispatcher"]
