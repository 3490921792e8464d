"""The ranks that a layer works on, as one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..collectives import LOCAL, Axis, axis_of
from .owners import Owners

#: a factor, or what gives it when a backward asks (a gradient scaler's scale)
Scale = float | Tensor | Callable[[], "float | Tensor"]


@dataclass(frozen=True, eq=False)
class Placement:
    """The ranks that share a layer's work. :meth:`equimoe.moe.MoE.place` puts a layer there.

    ``gradient_scale`` is the factor on the gradients of the layer's own losses (balance, z) that undoes what the engine
    does to all gradients after the backward:

    ==============================================  =============================================
    the engine                                      gradient_scale
    ==============================================  =============================================
    adds up the gradients of the ranks              1 (ours)
    averages over n ranks (DDP, FSDP)               n
    divides by the step's tokens T in the end       T, or n T if it also averages over n ranks
    multiplies losses by a gradient scaler's scale  the scale, or n times the scale; a function
    ==============================================  =============================================
    """

    #: ranks that hold different tokens
    tokens: Axis = LOCAL
    #: those among them that hold parts of the same sequences
    sequence: Axis = LOCAL
    #: ranks that hold the same tokens (tensor parallelism without sequence parallelism)
    copies: Axis = LOCAL
    #: ranks that the experts are split over, and ranks that each split every expert's width
    ep: Axis = LOCAL
    etp: Axis = LOCAL
    #: which rank of ``ep`` owns which expert; None: equal runs of consecutive experts
    owners: Owners | None = None
    #: int64 [S], the positions in the sequence that this rank holds; None: in rank order
    positions_S: Tensor | None = None
    gradient_scale: Scale = 1.0

    @classmethod
    def of_group(cls, group: Any, gradient_scale: Scale | None = None) -> Placement:
        """For ranks of a process group that hold different tokens, and whose gradients an engine averages."""
        axis = axis_of("group", group)
        return cls(tokens=axis, gradient_scale=float(axis.size) if gradient_scale is None else gradient_scale)

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """Those over which loads are counted."""
        return self.tokens, self.sequence

    def __deepcopy__(self, memo: dict) -> Placement:
        return self  # a copied layer is on the same ranks, and the scale is asked of the same scaler

    @property
    def scale(self) -> float | Tensor:
        """The factor now."""
        scale = self.gradient_scale
        return scale() if callable(scale) and not isinstance(scale, Tensor) else scale

    def owners_of(self, num_experts: int) -> Owners:
        """Who owns each of ``num_experts`` experts. Raises ValueError where that does not fit the ranks."""
        owners = self.owners or Owners.consecutive(num_experts, self.ep.size)
        if (owners.num_experts, owners.ranks) != (num_experts, self.ep.size):
            raise ValueError(
                f"placement.owners: has {owners.num_experts} experts on {owners.ranks} ranks; this layer has "
                f"{num_experts} experts on {self.ep.size} expert-parallel ranks"
            )
        return owners
