"""DeepSeek-V2 and DeepSeek-V3."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...config import AttentionConfig, MoEConfig, RouterConfig
from ..architecture import Architecture
from ..given import Given, magnitude, rotary
from .common import architecture, silu, written

#: epsilon of the norms of the latents, which transformers has fixed
_LATENT_EPS = 1e-6


def _deepseek(c: Given, router: RouterConfig, expert_bias: bool) -> Architecture:
    silu(c, "dense feed-forwards and shared experts")
    c.only("moe_layer_freq", (1,), "this decoder has MoE layers in all blocks after the dense ones")
    c.only("mlp_bias", (False,), "feed-forwards of this decoder have no biases")
    c.only("rms_norm_eps", (_LATENT_EPS,), f"must be {_LATENT_EPS}, which transformers always uses for latents")
    heads = c.whole("num_attention_heads")
    c.only("num_key_value_heads", (heads,), f"must be num_attention_heads={heads}")
    base, scaling = rotary(c, 1e4)
    found = c.values.get("rope_parameters") or c.values.get("rope_scaling") or {}
    if scaling is not None and (all_dims := Given(found, c.where).real("mscale_all_dim", 0.0, zero=True)):
        scaling = replace(scaling, score_scale=magnitude(scaling.factor, all_dims) ** 2)
    attention = AttentionConfig(
        "latent",
        bias="all" if c.flag("attention_bias") else "none",
        rotary_base=base,
        scaling=scaling,
        q_lora_rank=0 if c.values.get("q_lora_rank", 0) is None else c.whole("q_lora_rank", default=1536),
        kv_lora_rank=c.whole("kv_lora_rank"),
        qk_nope_width=c.whole("qk_nope_head_dim"),
        qk_rope_width=c.whole("qk_rope_head_dim"),
        v_width=c.whole("v_head_dim"),
    )
    width = c.whole("moe_intermediate_size")
    shared = 0 if c.values.get("n_shared_experts", 0) is None else c.whole("n_shared_experts", least=0)
    moe = MoEConfig(
        hidden_size=c.whole("hidden_size"),
        intermediate_size=width,
        num_experts=c.whole("n_routed_experts", "num_local_experts", "num_experts"),
        top_k=c.whole("num_experts_per_tok"),
        router=router,
        shared_intermediate_size=width * shared,
    )
    dense = c.whole("first_k_dense_replace", least=0)
    if dense >= c.whole("num_hidden_layers"):
        raise c.error("first_k_dense_replace", "must be less than num_hidden_layers; the model has no MoE layer")
    more: dict[str, Any] = {"intermediate_size": c.whole("intermediate_size"), "expert_bias": expert_bias}
    return architecture(c, moe, attention, (dense, 1), **more)


def read_v2(c: Given) -> Architecture:
    c.only("scoring_func", ("softmax",), "is an unknown router; this family has softmax")
    c.only(
        "topk_method", ("greedy", "group_limited_greedy"), "is an unknown router; use greedy or group_limited_greedy"
    )
    c.only("norm_topk_prob", (False,), "transformers does not normalise the gate weights of this family")
    grouped = c.values.get("topk_method") == "group_limited_greedy"
    router = RouterConfig(
        normalize_weights=False,
        weight_scale=c.real("routed_scaling_factor", 1.0),
        groups=c.whole("n_group") if grouped else 1,
        kept_groups=c.whole("topk_group") if grouped else 1,
        group_worth="best",
    )
    return _deepseek(c, router, False)


def read_v3(c: Given) -> Architecture:
    c.only("rope_interleave", (True,), "must be true, as in all published models of this family")
    c.only("scoring_func", ("sigmoid",), "is an unknown router; this family has sigmoid")
    c.only("topk_method", ("noaux_tc",), "is an unknown router; this family has noaux_tc")
    router = RouterConfig(
        score="sigmoid",
        normalize_weights=c.flag("norm_topk_prob", True),
        weight_scale=c.real("routed_scaling_factor", 2.5),
        groups=c.whole("n_group", default=8),
        kept_groups=c.whole("topk_group", default=4),
    )
    return _deepseek(c, router, True)


def _write_deepseek(a: Architecture) -> dict[str, Any]:
    t, router, width = a.attention, a.moe.router, a.moe.intermediate_size
    return written(a) | {
        "attention_bias": t.bias == "all",
        "q_lora_rank": t.q_lora_rank or None,
        "kv_lora_rank": t.kv_lora_rank,
        "qk_nope_head_dim": t.qk_nope_width,
        "qk_rope_head_dim": t.qk_rope_width,
        "v_head_dim": t.v_width,
        "moe_intermediate_size": width,
        "intermediate_size": a.intermediate_size or width,
        "n_routed_experts": a.moe.num_experts,
        "n_shared_experts": a.moe.shared_intermediate_size // width,
        "first_k_dense_replace": a.dense_layers,
        "routed_scaling_factor": router.weight_scale,
        "norm_topk_prob": router.normalize_weights,
        "n_group": router.groups,
        "topk_group": router.kept_groups,
    }


def write_v2(a: Architecture) -> dict[str, Any]:
    return _write_deepseek(a) | {"topk_method": "greedy" if a.moe.router.groups == 1 else "group_limited_greedy"}


def write_v3(a: Architecture) -> dict[str, Any]:
    return _write_deepseek(a) | {"rope_interleave": True, "num_nextn_predict_layers": 0}
