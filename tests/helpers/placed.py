"""Places layers on ranks by hand."""

from __future__ import annotations

from dataclasses import replace

from equimoe.moe import MoE, Placement
from equimoe.moe.collectives import Axis, world_axis


def spread_experts(layer: MoE, ranks: int) -> None:
    """Make the balancer believe that the experts are spread over ``ranks`` ranks, without splitting them."""
    layer.balancer.place(replace(layer.balancer.placement, ep=Axis("ep", size=ranks)))


def reduce_by(layer: MoE, reduction: str) -> None:
    """Place a layer whose ranks hold different tokens; the engine reduces gradients by "mean" or "sum"."""
    world = world_axis()
    layer.place(Placement(tokens=world, gradient_scale=float(world.size) if reduction == "mean" else 1.0))
