"""Estimates how long expert-parallel ranks wait for the busiest one.  E experts, P ranks, X any leading dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model import Decoder
from ..placement import Owners
from .speed import forward_flops


def straggler(counts_XE: Tensor, owners: Owners) -> Tensor:
    """Return fp64 [X]: rows of the busiest rank that owns experts, divided by the mean over these ranks.

    It is 1.0 when balanced or without rows, and at most the number of ranks.
    """
    return busiest_over_mean(owners.by_rank(counts_XE))


def busiest_over_mean(rows_XP: Tensor) -> Tensor:
    """Return fp64 [X]: the largest number of rows divided by the mean; 1.0 without rows."""
    load_XP = rows_XP.double()
    mean_X = load_XP.mean(-1)
    return torch.where(mean_X > 0, load_XP.amax(-1) / mean_X.clamp_min(1e-300), 1.0)


def possible_degrees(experts: int) -> tuple[int, ...]:
    """Return the expert-parallel degrees for which a factor is projected: powers of two that divide E, and E itself."""
    powers = (2**i for i in range(1, experts.bit_length()))
    return tuple(sorted({d for d in powers if experts % d == 0} | ({experts} if experts > 1 else set())))


def expert_fraction(model: Decoder) -> float:
    """Return the fraction of the model's floating-point operations that the routed experts of one MoE layer do.

    Forward and backward have the same fraction, see :func:`~equimoe.moe.observe.speed.forward_flops`.
    """
    parts, layers = forward_flops(model, masked=True), len(model.moe_layers())
    return parts["experts"] / (layers * sum(parts.values())) if layers else 0.0
