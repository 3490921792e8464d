"""The configurations of transformers' MoE models, and the decoder of this package that computes the same.

A :class:`Family` reads the content of a ``config.json`` as an :class:`Architecture`, and writes one. What the decoder
does not have is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..config import AttentionConfig, MoEConfig, RouterConfig
from .adapters import ACTIVATIONS
from .architecture import Architecture, canonical, flat
from .given import Given, magnitude, rotary, written_rotary

#: epsilon of the norms of the latents, which transformers has fixed
_LATENT_EPS = 1e-6


@dataclass(frozen=True)
class Family:
    """A class of models of transformers."""

    #: ``architectures`` of its ``config.json``
    class_name: str
    #: content of ``config.json`` -> architecture
    read: Callable[[Given], Architecture]
    #: architecture -> fields of ``config.json``
    write: Callable[[Architecture], dict[str, Any]]
    #: name of the MoE block in transformers 4; in version 5 it is "mlp" in all families
    block: str = "mlp"
    #: names of an expert's gate, up and down projection in transformers 4
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    #: name of the shared experts
    shared: str = "shared_experts"
    #: name of the gate of the shared experts
    shared_gate: str = "shared_expert_gate"
    #: whether a rotated pair of channels is two neighbours in the rows of the weights
    interleaved: bool = False
    #: whether the router has ``e_score_correction_bias``
    expert_bias: bool = False


# ---- what families have in common


def _architecture(
    c: Given, moe: MoEConfig, attention: AttentionConfig, dense: tuple[int, int], **more: Any
) -> Architecture:
    """``dense``: the first n blocks are dense, and MoE is in every m-th block."""
    c.only("attention_dropout", (0,), "this decoder has no dropout; set it to 0")
    return canonical(
        Architecture(
            num_layers=c.whole("num_hidden_layers"),
            num_heads=c.whole("num_attention_heads"),
            intermediate_size=more.pop("intermediate_size", None),
            moe_every=dense[1],
            dense_layers=dense[0],
            vocab_size=c.whole("vocab_size"),
            norm_eps=c.real("rms_norm_eps", 1e-6),
            tie_embeddings=c.flag("tie_word_embeddings"),
            moe=moe,
            attention=attention,
            **more,
        )
    )


def _silu(c: Given, what: str) -> str:
    if (found := c.activation()) != "silu":
        raise c.error("hidden_act", f"{what} of this decoder have silu; only models without them may have another one")
    return found


def _grouped(c: Given, rotary_base: float, **more: Any) -> AttentionConfig:
    base, scaling = rotary(c, rotary_base)
    heads, hidden = c.whole("num_attention_heads"), c.whole("hidden_size")
    found = AttentionConfig(
        num_kv_heads=c.whole("num_key_value_heads", default=heads),
        head_width=c.whole("head_dim", default=hidden // heads),
        rotary_base=base,
        scaling=scaling,
        **more,
    )
    found.check(hidden, heads)
    return found


def _biases(c: Given) -> dict[str, Any]:
    return {"bias": "all" if c.flag("attention_bias") else "none"}


def _written(a: Architecture) -> dict[str, Any]:
    names = {value: name for name, value in reversed(ACTIVATIONS.items())}
    return {
        "hidden_size": a.moe.hidden_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.attention.num_kv_heads or a.num_heads,
        "num_experts_per_tok": a.moe.top_k,
        "hidden_act": names.get(a.moe.activation, a.moe.activation),
        "rms_norm_eps": a.norm_eps,
        "tie_word_embeddings": a.tie_embeddings,
        "vocab_size": a.vocab_size,
        **written_rotary(a.attention),
    }


# ---- Mixtral


def _read_mixtral(c: Given) -> Architecture:
    c.only("router_jitter_noise", (0,), "this router has no noise; set it to 0")
    moe = MoEConfig(
        hidden_size=c.whole("hidden_size"),
        intermediate_size=c.whole("intermediate_size"),
        num_experts=c.whole("num_local_experts", "num_experts"),
        top_k=c.whole("num_experts_per_tok"),
        activation=c.activation(),  # type: ignore[arg-type]
    )
    window = c.whole("sliding_window") if c.values.get("sliding_window") is not None else None
    return _architecture(c, moe, _grouped(c, 1e6, window=window), (0, 1))


def _write_mixtral(a: Architecture) -> dict[str, Any]:
    own = {"num_local_experts": a.moe.num_experts, "intermediate_size": a.moe.intermediate_size}
    return _written(a) | own | {"head_dim": a.attention.head_width, "sliding_window": a.attention.window}


# ---- Qwen and OLMoE


def _dense(c: Given) -> tuple[int, int]:
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
    _silu(c, "dense feed-forwards and shared experts")
    return MoEConfig(
        hidden_size=c.whole("hidden_size"),
        intermediate_size=c.whole("moe_intermediate_size"),
        num_experts=c.whole("num_experts", "num_local_experts"),
        top_k=c.whole("num_experts_per_tok"),
        router=RouterConfig(normalize_weights=c.flag("norm_topk_prob")),
        **more,
    )


def _read_qwen2(c: Given) -> Architecture:
    width = c.whole("shared_expert_intermediate_size", least=1)
    moe = _qwen_moe(c, shared_intermediate_size=width, shared_gate=True)
    bias = "inputs" if c.flag("qkv_bias", True) else "none"
    attention = _grouped(c, 1e4, bias=bias, **_qwen2_window(c))
    return _architecture(c, moe, attention, _dense(c), intermediate_size=c.whole("intermediate_size"))


def _qwen2_window(c: Given) -> dict[str, Any]:
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


def _write_qwen2(a: Architecture) -> dict[str, Any]:
    t = a.attention
    windowed = [t.window is not None and block >= t.window_from for block in range(a.num_layers)]
    return _write_qwen(a) | {
        "shared_expert_intermediate_size": a.moe.shared_intermediate_size,
        "qkv_bias": t.bias == "inputs",
        "use_sliding_window": t.window is not None,
        "sliding_window": t.window,
        "layer_types": ["sliding_attention" if here else "full_attention" for here in windowed],
    }


def _write_qwen(a: Architecture) -> dict[str, Any]:
    return _written(a) | {
        "num_experts": a.moe.num_experts,
        "moe_intermediate_size": a.moe.intermediate_size,
        "intermediate_size": a.intermediate_size or a.moe.intermediate_size,
        "norm_topk_prob": a.moe.router.normalize_weights,
        "decoder_sparse_step": a.moe_every,
        "mlp_only_layers": [block for block in range(a.dense_layers) if (block + 1) % a.moe_every == 0],
        "head_dim": a.attention.head_width,
    }


def _read_qwen3(c: Given) -> Architecture:
    windowed = c.flag("use_sliding_window") and c.values.get("sliding_window") is not None
    window = c.whole("sliding_window") if windowed else None
    attention = _grouped(c, 1e4, qk_norm=True, window=window, **_biases(c))
    return _architecture(c, _qwen_moe(c), attention, _dense(c), intermediate_size=c.whole("intermediate_size"))


def _write_qwen3(a: Architecture) -> dict[str, Any]:
    window = a.attention.window
    own = {"attention_bias": a.attention.bias == "all", "use_sliding_window": window is not None}
    return _write_qwen(a) | own | {"sliding_window": window}


def _read_olmoe(c: Given) -> Architecture:
    c.only("clip_qkv", (), "this decoder does not clip queries, keys and values")
    moe = MoEConfig(
        hidden_size=c.whole("hidden_size"),
        intermediate_size=c.whole("intermediate_size"),
        num_experts=c.whole("num_experts", "num_local_experts"),
        top_k=c.whole("num_experts_per_tok"),
        activation=c.activation(),  # type: ignore[arg-type]
        router=RouterConfig(normalize_weights=c.flag("norm_topk_prob")),
    )
    attention = _grouped(c, 1e4, qk_norm=True, qk_norm_over="all_heads", **_biases(c))
    if attention.head_width != c.whole("hidden_size") // c.whole("num_attention_heads"):
        raise c.error("head_dim", "must be hidden_size / num_attention_heads")
    return _architecture(c, moe, attention, (0, 1))


def _write_olmoe(a: Architecture) -> dict[str, Any]:
    return _written(a) | {
        "num_experts": a.moe.num_experts,
        "intermediate_size": a.moe.intermediate_size,
        "norm_topk_prob": a.moe.router.normalize_weights,
        "attention_bias": a.attention.bias == "all",
    }


# ---- DeepSeek


def _deepseek(c: Given, router: RouterConfig, expert_bias: bool) -> Architecture:
    _silu(c, "dense feed-forwards and shared experts")
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
    return _architecture(c, moe, attention, (dense, 1), **more)


def _read_v2(c: Given) -> Architecture:
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


def _read_v3(c: Given) -> Architecture:
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
    return _written(a) | {
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


def _write_v2(a: Architecture) -> dict[str, Any]:
    return _write_deepseek(a) | {"topk_method": "greedy" if a.moe.router.groups == 1 else "group_limited_greedy"}


def _write_v3(a: Architecture) -> dict[str, Any]:
    return _write_deepseek(a) | {"rope_interleave": True, "num_nextn_predict_layers": 0}


#: ``model_type`` of a ``config.json`` -> family
FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        "MixtralForCausalLM", _read_mixtral, _write_mixtral, block="block_sparse_moe", expert=("w1", "w3", "w2")
    ),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _read_qwen3, _write_qwen3),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", _read_qwen2, _write_qwen2, shared="shared_expert"),
    "olmoe": Family("OlmoeForCausalLM", _read_olmoe, _write_olmoe),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", _read_v2, _write_v2, interleaved=True),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", _read_v3, _write_v3, interleaved=True, expert_bias=True),
}


def read_config(values: Any, where: str) -> tuple[str, Architecture]:
    """Return the family and the architecture of a ``config.json``. ``where`` names it in errors."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: must be an object")
    c = Given(values, where)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise c.error("model_type", f"is an unknown architecture; use one of {', '.join(FAMILIES)}")
    if values.get("quantization_config") is not None:
        raise ValueError(f"{where}: quantization_config: quantised weights are not read; save the model without it")
    try:
        return kind, FAMILIES[kind].read(c)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(where) else f"{where}: {text}") from None


def family_of(wanted: Architecture) -> tuple[str, dict[str, Any]]:
    """Return the family whose models can compute as this architecture, and the fields of its ``config.json``."""
    near = []
    for kind, family in FAMILIES.items():
        if family.expert_bias != wanted.expert_bias or family.interleaved != (wanted.attention.kind == "latent"):
            continue
        written = family.write(wanted)
        try:
            found = _rounded(family.read(Given(written, kind)))
        except ValueError as error:
            near.append((1, str(error)))
            continue
        if found == _rounded(wanted):
            return kind, written | {"model_type": kind, "architectures": [family.class_name]}
        theirs = dict(flat(found.sections()))
        odd = [f"{name}={value!r}" for name, value in flat(wanted.sections()) if value != theirs.get(name)]
        near.append((len(odd), f"{kind}, which cannot have {', '.join(odd)}"))
    nearest = f"the nearest is {min(near)[1]}" if near else f"those that can be written are {', '.join(FAMILIES)}"
    raise ValueError(f"no model of transformers computes as this checkpoint's; {nearest}")


def _rounded(found: Architecture) -> Architecture:
    """Forget the last digits of a number that a ``config.json`` holds only as the result of a formula."""
    scaling = found.attention.scaling
    if scaling is None:
        return found
    scaling = replace(scaling, score_scale=float(f"{scaling.score_scale:.12g}"))
    return replace(found, attention=replace(found.attention, scaling=scaling))
