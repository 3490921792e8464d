"""The fields of published models' ``config.json`` that determine their weights, as transformers 4 wrote them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    #: published number of parameters
    parameters: float
    config: dict[str, Any]


def _model(kind: str, hidden: int, layers: int, heads: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocabulary}
    return {"model_type": kind, "hidden_act": "silu", "rms_norm_eps": 1e-6} | sizes | more


_QWEN3 = {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "rope_theta": 1e6}
_LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rope_theta": 10000}

PUBLISHED: dict[str, Published] = {
    "Mixtral-8x7B": Published(
        46.7e9,
        _model("mixtral", 4096, 32, 32, 32000, num_key_value_heads=8, intermediate_size=14336, num_local_experts=8)
        | {"num_experts_per_tok": 2, "rope_theta": 1e6, "sliding_window": None, "rms_norm_eps": 1e-5},
    ),
    "Qwen1.5-MoE-A2.7B": Published(
        14.3e9,
        _model("qwen2_moe", 2048, 24, 16, 151936, num_key_value_heads=16, intermediate_size=5632, num_experts=60)
        | {"num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
        | {"use_sliding_window": False, "max_window_layers": 21, "sliding_window": 32768, "norm_topk_prob": False},
    ),
    "Qwen3-30B-A3B": Published(
        30.5e9,
        _model("qwen3_moe", 2048, 48, 32, 151936, num_key_value_heads=4, intermediate_size=6144)
        | _QWEN3
        | {"moe_intermediate_size": 768, "mlp_only_layers": [], "decoder_sparse_step": 1, "attention_bias": False},
    ),
    "Qwen3-235B-A22B": Published(
        235.1e9,
        _model("qwen3_moe", 4096, 94, 64, 151936, num_key_value_heads=4, intermediate_size=12288)
        | _QWEN3
        | {"moe_intermediate_size": 1536},
    ),
    "OLMoE-1B-7B": Published(
        6.92e9,
        _model("olmoe", 2048, 16, 16, 50304, num_key_value_heads=16, intermediate_size=1024, num_experts=64)
        | {"num_experts_per_tok": 8, "norm_topk_prob": False, "clip_qkv": None, "rms_norm_eps": 1e-5},
    ),
    "DeepSeek-V2-Lite": Published(
        15.7e9,
        _model("deepseek_v2", 2048, 27, 16, 102400, num_key_value_heads=16, intermediate_size=10944, q_lora_rank=None)
        | _LATENT
        | {"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1408}
        | {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": False},
    ),
    "DeepSeek-V2": Published(
        235.7e9,
        _model("deepseek_v2", 5120, 60, 128, 102400, num_key_value_heads=128, intermediate_size=12288, q_lora_rank=1536)
        | _LATENT
        | {"n_routed_experts": 160, "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1536}
        | {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0}
        | {"first_k_dense_replace": 1, "norm_topk_prob": False, "scoring_func": "softmax"},
    ),
    "DeepSeek-V3": Published(
        671.0e9,
        _model("deepseek_v3", 7168, 61, 128, 129280, num_key_value_heads=128, intermediate_size=18432, q_lora_rank=1536)
        | _LATENT
        | {"n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048}
        | {"topk_method": "noaux_tc", "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5}
        | {
            "first_k_dense_replace": 3,
            "norm_topk_prob": True,
            "scoring_func": "sigmoid",
            "num_nextn_predict_layers": 1,
        },
    ),
    "Llama-3.1-8B": Published(
        8.03e9,
        _model("llama", 4096, 32, 32, 128256, num_key_value_heads=8, intermediate_size=14336, attention_bias=False)
        | {"rms_norm_eps": 1e-5, "mlp_bias": False, "pretraining_tp": 1, "rope_theta": 5e5}
        | {
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0}
            | {"original_max_position_embeddings": 8192}
        },
    ),
    "Mistral-7B": Published(
        7.24e9,
        _model("mistral", 4096, 32, 32, 32000, num_key_value_heads=8, intermediate_size=14336, sliding_window=4096)
        | {"rms_norm_eps": 1e-5, "rope_theta": 1e4},
    ),
    "Qwen2.5-7B": Published(
        7.62e9,
        _model("qwen2", 3584, 28, 28, 152064, num_key_value_heads=4, intermediate_size=18944, rope_theta=1e6)
        | {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28},
    ),
    "Qwen3-8B": Published(
        8.19e9,
        _model("qwen3", 4096, 36, 32, 151936, num_key_value_heads=8, intermediate_size=12288, head_dim=128)
        | {"rope_theta": 1e6, "attention_bias": False, "use_sliding_window": False, "sliding_window": None}
        | {"max_window_layers": 36},
    ),
}


def config_of(name: str) -> dict[str, Any]:
    """Return a copy of a model's configuration."""
    return dict(PUBLISHED[name].config)
