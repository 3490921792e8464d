"""Qwen2-MoE, Qwen3-MoE and OLMoE, and the dense models Qwen2 and Qwen3."""

from __future__ import annotations

from typing import Any

from ...config import MoEConfig, RouterConfig
from ..architecture import Architecture
from ..given import Given
from .common import architecture, biases, dense, grouped, silu, written


def _dense_blocks(c: Given) -> tuple[int, int]:
    """Return after how many dense blocks every n-th has an MoE layer."""
    every, layers = c.whole("decoder_sparse_step", default=1), c.whole("num_hidden_layers")
    listed = c.values.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(type(number) is int for number in listed):
        raise c.error("mlp_only_layers", "must be a list of numbers")
    dense = set(listed)
    moe = {i for i in range(layers) if i not in dense and (i + 1) % every == 0}
    first = min(moe, default=layers)
    if not moe or moe != {i for i in range(first, layers) if (i + 1) % every == 0}:
        raise c.error("mlp_only_layers", "this decoder can have dense feed-forwards only in its first blocks")
    return (first if first >= every else 0), every


def _qwen_moe(c: Given, **more: Any) -> MoEConfig:
    silu(c, "dense feed-forwards and shared experts")
    return MoEConfig(
        hidden_size=c.whole("hidden_size"),
        intermediate_size=c.whole("moe_intermediate_size"),
        num_experts=c.whole("num_experts", "num_local_experts"),
        top_k=c.whole("num_experts_per_tok"),
        router=RouterConfig(normalize_weights=c.flag("norm_topk_prob")),
        **more,
    )


def read_qwen2(c: Given) -> Architecture:
    width = c.whole("shared_expert_intermediate_size", least=0)
    moe = _qwen_moe(c, shared_intermediate_size=width, shared_gate=width > 0)
    bias = "inputs" if c.flag("qkv_bias", True) else "none"
    attention = grouped(c, 1e4, bias=bias, **_late_window(c))
    return architecture(c, moe, attention, _dense_blocks(c), intermediate_size=c.whole("intermediate_size"))


def _late_window(c: Given) -> dict[str, Any]:
    """Return the window, and from which block on. transformers 5 lists the kind of each block's attention."""
    if not c.flag("use_sliding_window"):
        return {}
    layers, window = c.whole("num_hidden_layers"), c.whole("sliding_window")
    kinds = c.values.get("layer_types")
    if kinds is None:
        raise c.error(
            "layer_types", "versions of transformers disagree which blocks have the sliding window; list them"
        )
    first = kinds.index("sliding_attention") if isinstance(kinds, list) and "sliding_attention" in kinds else layers
    if kinds != ["full_attention"] * first + ["sliding_attention"] * (layers - first):
        raise c.error("layer_types", "this decoder can have full attention only in its first blocks")
    return {"window": window, "window_from": first} if first < layers else {}


def _write_late_window(a: Architecture) -> dict[str, Any]:
    t = a.attention
    windowed = [t.window is not None and block >= t.window_from for block in range(a.num_layers)]
    return {
        "use_sliding_window": t.window is not None,
        "sliding_window": t.window,
        "layer_types": ["sliding_attention" if here else "full_attention" for here in windowed],
    }


def write_qwen2(a: Architecture) -> dict[str, Any]:
    own = {"shared_expert_intermediate_size": a.moe.shared_intermediate_size, "qkv_bias": a.attention.bias == "inputs"}
    return _write_qwen(a) | own | _write_late_window(a)


def _write_qwen(a: Architecture) -> dict[str, Any]:
    return written(a) | {
        "num_experts": a.moe.num_experts,
        "moe_intermediate_size": a.moe.intermediate_size,
        "intermediate_size": a.intermediate_size or a.moe.intermediate_size,
        "norm_topk_prob": a.moe.router.normalize_weights,
        "decoder_sparse_step": a.moe_every,
        "mlp_only_layers": [block for block in range(a.dense_layers) if (block + 1) % a.moe_every == 0],
        "head_dim": a.attention.head_width,
    }


def read_qwen3(c: Given) -> Architecture:
    windowed = c.flag("use_sliding_window") and c.values.get("sliding_window") is not None
    window = c.whole("sliding_window") if windowed else None
    attention = grouped(c, 1e4, qk_norm=True, window=window, **biases(c))
    return architecture(c, _qwen_moe(c), attention, _dense_blocks(c), intermediate_size=c.whole("intermediate_size"))


def write_qwen3(a: Architecture) -> dict[str, Any]:
    window = a.attention.window
    own = {"attention_bias": a.attention.bias == "all", "use_sliding_window": window is not None}
    return _write_qwen(a) | own | {"sliding_window": window}


def read_olmoe(c: Given) -> Architecture:
    c.only("clip_qkv", (), "this decoder does not clip queries, keys and values")
    moe = MoEConfig(
        hidden_size=c.whole("hidden_size"),
        intermediate_size=c.whole("intermediate_size"),
        num_experts=c.whole("num_experts", "num_local_experts"),
        top_k=c.whole("num_experts_per_tok"),
        activation=c.activation(),  # type: ignore[arg-type]
        router=RouterConfig(normalize_weights=c.flag("norm_topk_prob")),
    )
    attention = grouped(c, 1e4, qk_norm=True, qk_norm_over="all_heads", **biases(c))
    if attention.head_width != c.whole("hidden_size") // c.whole("num_attention_heads"):
        raise c.error("head_dim", "must be hidden_size / num_attention_heads")
    return architecture(c, moe, attention, (0, 1))


def write_olmoe(a: Architecture) -> dict[str, Any]:
    return written(a) | {
        "num_experts": a.moe.num_experts,
        "intermediate_size": a.moe.intermediate_size,
        "norm_topk_prob": a.moe.router.normalize_weights,
        "attention_bias": a.attention.bias == "all",
    }


def read_dense_qwen2(c: Given) -> Architecture:
    return dense(c, grouped(c, 1e4, bias="inputs", **_late_window(c)))


def write_dense_qwen2(a: Architecture) -> dict[str, Any]:
    return written(a) | {"head_dim": a.attention.head_width} | _write_late_window(a)


def read_dense_qwen3(c: Given) -> Architecture:
    return dense(c, grouped(c, 1e4, 128, qk_norm=True, **biases(c), **_late_window(c)))


def write_dense_qwen3(a: Architecture) -> dict[str, Any]:
    return write_dense_qwen2(a) | {"attention_bias": a.attention.bias == "all"}
