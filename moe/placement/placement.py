"""A value that holds all axes of ranks that a layer needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..collectives import LOCAL, Axis, axis_of
from .owners import Owners

#: a factor, or a function that returns it during the backward
Scale = float | Tensor | Callable[[], "float | Tensor"]


@dataclass(frozen=True, eq=False)
class Placement:
    """The ranks that share a layer's work. Pass it to :meth:`equimoe.moe.MoE.place`.

    ``gradient_scale`` multiplies the gradients of the layer's own losses (balance, z). It must undo what the engine
    does to all gradients after the backward:

    ==============================================  =============================================
    the engine                                      gradient_scale
    ==============================================  =============================================
    sums gradients over the ranks                   1 (our engine)
    averages over n ranks (DDP, FSDP)               n
    divides by the step's tokens T in the end       T, or n T if it also averages over n ranks
    multiplies losses by a scale of its own         the scale, or n times the scale; a function
    ==============================================  =============================================

    For a gradient scaler of torch's, call :func:`equimoe.moe.use_gradient_scaler` instead.
    """

    #: ranks that hold different tokens
    tokens: Axis = LOCAL
    #: the subset of these that holds parts of the same sequences
    sequence: Axis = LOCAL
    #: ranks that hold the same tokens (tensor parallelism without sequence parallelism)
    copies: Axis = LOCAL
    #: ranks that the experts are distributed over
    ep: Axis = LOCAL
    #: ranks that split each expert's width
    etp: Axis = LOCAL
    #: which rank of ``ep`` owns which expert; None: equal runs of consecutive experts
    owners: Owners | None = None
    #: int64 [S], positions of the sequence that this rank holds; None: consecutive parts in rank order
    positions_S: Tensor | None = None
    gradient_scale: Scale = 1.0

    @classmethod
    def of_group(cls, group: Any, gradient_scale: Scale | None = None) -> Placement:
        """Place a layer on a process group whose ranks hold different tokens, and whose engine averages gradients."""
        axis = axis_of("group", group)
        return cls(tokens=axis, gradient_scale=float(axis.size) if gradient_scale is None else gradient_scale)

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """The axes over which tokens per expert are counted."""
        return self.tokens, self.sequence

    def __deepcopy__(self, memo: dict) -> Placement:
        return self  # a copied layer uses the same ranks

    @property
    def scale(self) -> float | Tensor:
        """The current factor."""
        scale = self.gradient_scale
        return scale() if callable(scale) and not isinstance(scale, Tensor) else scale

    def owners_of(self, num_experts: int) -> Owners:
        """Return the owners of ``num_experts`` experts. Raises ValueError if they do not fit the experts or ranks."""
        owners = self.owners or Owners.consecutive(num_experts, self.ep.size)
        if (owners.num_experts, owners.ranks) != (num_experts, self.ep.size):
            raise ValueError(
                f"placement.owners: is for num_experts={owners.num_experts} and ranks={owners.ranks}; this layer has "
                f"num_experts={num_experts} and expert-parallel size {self.ep.size}; build the owners for these"
            )
        return owners
