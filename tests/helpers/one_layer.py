"""A small MoE layer, tokens for it, and steps that train only its balance."""

from __future__ import annotations

import torch

from equimoe.moe import BalanceConfig, MoE, MoEConfig


def make(**balance: object) -> MoE:
    torch.manual_seed(0)
    config = BalanceConfig(**{"coefficient": 1.0, **balance})  # type: ignore[arg-type]
    return MoE(MoEConfig(hidden_size=6, intermediate_size=8, num_experts=4, top_k=2, balance=config, init_std=0.5))


def batches(count: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5 + 3 * i, 6, generator=generator) for i in range(count)]


def balance_only(layer: MoE, x: torch.Tensor) -> None:
    (layer(x) * 0).sum().backward()


def seen(layer: MoE) -> list[int]:
    return [int(visit.tokens_B.sum()) for visit in layer.balancer.visits]
