"""Estimates how long expert-parallel ranks wait for the busiest one.  E experts, P ranks, X any leading dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model import Attention, Decoder, LatentAttention
from ..placement import Owners


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

    Products with weight matrices are counted per token, and attention over half a sequence on average. Forward and
    backward have the same fraction.
    """
    layers, total = model.moe_layers(), 0.0
    routed = {id(w): layer.config for layer in layers for w in layer.experts.parameters()}
    of_layer = 0.0
    for name, weight in model.named_parameters(remove_duplicate=False):  # the head may be the embedding's weight
        if weight.dim() < 2 or name.startswith("embedding"):
            continue
        config = routed.get(id(weight))
        flops = 2.0 * weight.numel() * (1.0 if config is None else config.top_k / config.num_experts)
        total += flops
        of_layer += flops / len(layers) if config is not None else 0.0
    for attention in (module for module in model.modules() if isinstance(module, Attention)):
        # total width of all heads' values; except in latent attention, queries are as wide
        inner = attention.get_parameter("out_proj.weight").shape[1]
        queries = attention.q_up_proj.out_features if isinstance(attention, LatentAttention) else inner
        pairs = attention.cos_SR.shape[0] * (1 if attention.window is None else 2)  # a mask hides none from the kernel
        total += pairs * (queries + inner)
    return of_layer / total
