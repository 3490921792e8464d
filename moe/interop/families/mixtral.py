"""Mixtral, and the dense models whose attention it has: Llama and Mistral."""

from __future__ import annotations

from typing import Any

from ...config import MoEConfig
from ..architecture import Architecture
from ..given import Given
from .common import architecture, biases, dense, grouped, written


def read_mixtral(c: Given) -> Architecture:
    c.only("router_jitter_noise", (0,), "this router has no noise; set it to 0")
    moe = MoEConfig(
        hidden_size=c.whole("hidden_size"),
        intermediate_size=c.whole("intermediate_size"),
        num_experts=c.whole("num_local_experts", "num_experts"),
        top_k=c.whole("num_experts_per_tok"),
        activation=c.activation(),  # type: ignore[arg-type]
    )
    return architecture(c, moe, grouped(c, 1e6, window=_window(c, None)), (0, 1))


def write_mixtral(a: Architecture) -> dict[str, Any]:
    own = {"num_local_experts": a.moe.num_experts, "intermediate_size": a.moe.intermediate_size}
    return written(a) | own | {"head_dim": a.attention.head_width, "sliding_window": a.attention.window}


def _window(c: Given, missing: int | None) -> int | None:
    """Return the sliding window; ``missing`` is that of a file that does not say it."""
    none = c.values.get("sliding_window", missing) is None
    return None if none else c.whole("sliding_window", default=missing)


def read_llama(c: Given) -> Architecture:
    return dense(c, grouped(c, 1e4, **biases(c)))


def write_llama(a: Architecture) -> dict[str, Any]:
    return written(a) | {"head_dim": a.attention.head_width, "attention_bias": a.attention.bias == "all"}


def read_mistral(c: Given) -> Architecture:
    return dense(c, grouped(c, 1e4, window=_window(c, 4096)))


def write_mistral(a: Architecture) -> dict[str, Any]:
    return written(a) | {"head_dim": a.attention.head_width, "sliding_window": a.attention.window}
