"""Checks that the numbers of a step are finite, with the same answer on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..collectives import Axis, sum_over
from ..transfer import Reading


def finite_here(losses: Sequence[Tensor], norm: Tensor) -> Tensor:
    """Return a bool scalar: whether this rank's losses and gradient norm are finite."""
    sums = [losses_BS.sum(dtype=torch.float64).to(norm.device) for losses_BS in losses]
    return torch.stack([norm.double().reshape(()), *sums]).isfinite().all()


def finite_everywhere(losses: Sequence[Tensor], norm: Tensor, axis: Axis) -> bool:
    """Return whether losses and gradient norm are finite on all ranks of ``axis``. All of them must call this.

    A gradient can be damaged on one rank after it has been reduced. If each rank decided on its own, some would update
    their weights and others would not.
    """
    return bool(Reading(sum_over(finite_here(losses, norm).long(), axis).get()).get() == axis.size)
