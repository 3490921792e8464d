"""Mixtral."""

from __future__ import annotations

from typing import Any

from ...config import MoEConfig
from ..architecture import Architecture
from ..given import Given
from .common import architecture, grouped, written


def read_mixtral(c: Given) -> Architecture:
    c.only("router_jitter_noise", (0,), "this router has no noise; set it to 0")
    moe = MoEConfig(
        hidden_size=c.whole("hidden_size"),
        intermediate_size=c.whole("intermediate_size"),
        num_experts=c.whole("num_local_experts", "num_experts"),
        top_k=c.whole("num_experts_per_tok"),
        activation=c.activation(),  # type: ignore[arg-type]
    )
    window = c.whole("sliding_window") if c.values.get("sliding_window") is not None else None
    return architecture(c, moe, grouped(c, 1e6, window=window), (0, 1))


def write_mixtral(a: Architecture) -> dict[str, Any]:
    own = {"num_local_experts": a.moe.num_experts, "intermediate_size": a.moe.intermediate_size}
    return written(a) | own | {"head_dim": a.attention.head_width, "sliding_window": a.attention.window}
