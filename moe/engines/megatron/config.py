"""Reads the settings of an MoE layer from Megatron-Core's TransformerConfig."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.transformer import TransformerConfig

from ...config import BalanceConfig, CapacityConfig, DispatchConfig, ExtraLossConfig, MoEConfig, RouterConfig

Estimator = Literal["rolling", "carry", "adaptive", "exact"]
RouterName = Literal["equimoe", "megatron"]

#: Megatron's name of a balance loss -> this package's scope
SCOPES = {"aux_loss": "micro", "seq_aux_loss": "sequence", "global_aux_loss": "global"}
#: Megatron's activation function -> this package's
_ACTIVATIONS: dict[Callable[..., Any], str] = {F.silu: "silu", F.gelu: "gelu", squared_relu: "relu2"}
_DISPATCHERS = {"allgather": "all_gather", "alltoall": "all_to_all", "flex": "deepep"}
#: parts of a transformer layer that CUDA graphs and activation offloading may cover
_GRAPHED, _OFFLOADED = {"attn", "mlp", "mamba"}, {"attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm"}
#: what errors call a setting -> Megatron's name
_NAMES = {
    "top_k": "moe_router_topk",
    "num_experts": "num_moe_experts",
    "intermediate_size": "moe_ffn_hidden_size",
    "balance.coefficient": "moe_aux_loss_coeff",
    "balance.extra.micro": "moe_aux_loss_coeff",
    "balance.extra.sequence": "moe_aux_loss_coeff",
    "router.z_loss": "moe_z_loss_coeff",
    "router.groups": "moe_router_num_groups",
    "router.kept_groups": "moe_router_group_topk",
    "router.score": "moe_router_score_function",
    "router.weight_scale": "moe_router_topk_scaling_factor",
    "capacity.factor": "moe_expert_capacity_factor",
}

#: (field, values that this layer has, remedy)
_ONLY: list[tuple[str, tuple[Any, ...], str]] = [
    ("add_bias_linear", (False,), "the experts have no biases; set it to False (--disable-bias-linear)"),
    ("moe_apply_probs_on_input", (False,), "gate weights are applied to the experts' outputs; set it to False"),
    ("moe_latent_size", (None,), "there are no latent projections; leave it out"),
    ("moe_token_dropping", (False,), "Megatron-Core does not implement it; use moe_expert_capacity_factor"),
    ("moe_shared_expert_overlap", (False,), "shared experts are computed after the exchange of rows; set it to False"),
    ("overlap_moe_expert_parallel_comm", (False,), "layers cannot be split between micro-batches; set it to False"),
    ("delay_wgrad_compute", (False,), "weight gradients are computed in the backward; set it to False"),
    ("fp8", (None,), "the experts compute in the dtype of their weights; leave it out"),
    ("fp4", (None,), "the experts compute in the dtype of their weights; leave it out"),
    ("glu_linear_offset", (0.0,), "the experts' GLU has no offset; set it to 0"),
    ("activation_func_clamp_value", (None,), "the experts' activation is not clamped; leave it out"),
    ("use_te_activation_func", (False,), "the activation is fused into the experts; set it to False"),
    ("activation_func_fp8_input_store", (False,), "activations are kept in the dtype of the rows; set it to False"),
    ("quant_recipe", (None,), "the experts compute in the dtype of their weights; leave it out"),
    ("use_kitchen", (False,), "the experts compute in the dtype of their weights; set it to False"),
]
#: the same, for settings that Megatron's own router has
_ONLY_OUR_ROUTER: list[tuple[str, tuple[Any, ...], str]] = [
    ("moe_router_dtype", (None, "fp32"), "this router always computes in fp32; use 'fp32'"),
    ("moe_input_jitter_eps", (None,), "this router adds no noise; leave it out"),
    ("moe_router_force_load_balancing", (False,), "this router does not draw random experts; set it to False"),
    ("moe_enable_routing_replay", (False,), "this router cannot replay; set it to False"),
]
#: the same, for estimator "exact": Megatron draws dropout from random states of its own
_ONLY_EXACT: list[tuple[str, tuple[Any, ...], str]] = [
    (name, (0.0,), "with estimator='exact', the counting pass would draw another dropout than the training; use 0.0")
    for name in ("attention_dropout", "hidden_dropout")
]


def moe_config(
    config: TransformerConfig, router: RouterName = "equimoe", estimator: Estimator = "rolling"
) -> MoEConfig:
    """Return the layer that ``config`` describes. Raises ValueError for a setting that this layer does not have."""
    for name, value, allowed in (("router", router, RouterName), ("estimator", estimator, Estimator)):
        if value not in get_args(allowed):
            raise ValueError(f"{name}={value!r}: use one of {', '.join(get_args(allowed))}")
    try:
        return _moe_config(config, router, estimator)
    except ValueError as error:
        text = str(error)
        for ours, theirs in _NAMES.items():
            text = re.sub(rf"(?<![\w.]){re.escape(ours)}(?!\w)", theirs, text)
        raise ValueError(text) from None


def _moe_config(config: TransformerConfig, router: RouterName, estimator: Estimator) -> MoEConfig:
    if config.num_moe_experts is None:
        raise ValueError("num_moe_experts=None: an MoE layer needs experts; set it, or use a dense layer spec")
    _check(config, _ONLY)
    _check_parts(config)
    if router == "equimoe":
        _check(config, _ONLY_OUR_ROUTER, " here, or use router='megatron'")
        if estimator == "exact":
            _check(config, _ONLY_EXACT, ", or use estimator='rolling'")
        balance, routing = _balance(config, estimator), _router(config)
        capacity = _capacity(config)
    else:  # Megatron's router scores, selects, drops and balances
        if estimator != "rolling":
            raise ValueError(
                f"estimator={estimator!r}: Megatron-Core's router has only 'rolling'; use router='equimoe'"
            )
        balance, routing, capacity = BalanceConfig("micro", 0.0), RouterConfig(normalize_weights=False), None
        if config.moe_pad_expert_input_to_capacity:
            raise ValueError(
                "moe_pad_expert_input_to_capacity=True: with router='megatron', rows are not padded; set it to False"
            )
    modules = config.recompute_modules or [] if config.recompute_granularity == "selective" else []
    width = config.moe_ffn_hidden_size
    assert width is not None, "TransformerConfig sets it"
    return MoEConfig(
        hidden_size=config.hidden_size,
        intermediate_size=width,
        num_experts=config.num_moe_experts,
        top_k=config.moe_router_topk,
        router=routing,
        balance=balance,
        capacity=capacity,
        dispatch=DispatchConfig(_dispatcher(config)),  # type: ignore[arg-type]
        activation=_activation(config),  # type: ignore[arg-type]
        gated=config.gated_linear_unit,
        recompute_experts="moe_act" in modules,
    )


def _check(config: TransformerConfig, table: list[tuple[str, tuple[Any, ...], str]], end: str = "") -> None:
    for name, allowed, remedy in table:
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: {remedy}{end}")


def _check_parts(config: TransformerConfig) -> None:
    """Raise ValueError if CUDA graphs or activation offloading cover a part of this layer."""
    captured = [getattr(scope, "name", str(scope)) for scope in config.cuda_graph_scope or []]
    if config.cuda_graph_impl != "none" and (not captured or set(captured) - _GRAPHED):
        raise ValueError(f"cuda_graph_scope={captured}: this layer cannot be captured; use ['attn']")
    offloaded = config.offload_modules if config.fine_grained_activation_offloading else None
    if set(offloaded or []) - _OFFLOADED:
        raise ValueError(f"offload_modules={offloaded}: the experts offload nothing; leave out expert_fc1 and moe_act")


def loss_types(config: TransformerConfig) -> dict[str, float]:
    """Return Megatron's name and coefficient of each balance loss that is switched on."""
    names, coefficients = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    if isinstance(names, str):
        names, coefficients = [names], [coefficients]
    assert isinstance(coefficients, list), "TransformerConfig checks it"
    return {name: float(c) for name, c in zip(names, coefficients, strict=True) if c and name != "none"}


def _balance(config: TransformerConfig, estimator: Estimator) -> BalanceConfig:
    names = config.moe_router_load_balancing_type
    for name in [names] if isinstance(names, str) else names:
        if name not in SCOPES and name != "none":
            raise ValueError(
                f"moe_router_load_balancing_type={name!r}: use {', '.join(SCOPES)} or none; router='megatron' also has "
                "sinkhorn"
            )
    losses = {SCOPES[name]: coefficient for name, coefficient in loss_types(config).items()}
    if not losses:
        return BalanceConfig("micro", 0.0, estimator)
    scope = "global" if "global" in losses else next(iter(losses))
    coefficient = losses.pop(scope)
    return BalanceConfig(scope, coefficient, estimator, extra=ExtraLossConfig(**losses))  # type: ignore[arg-type]


def _router(config: TransformerConfig) -> RouterConfig:
    softmax = config.moe_router_score_function == "softmax"
    after = softmax and not config.moe_router_pre_softmax
    return RouterConfig(
        score=config.moe_router_score_function,
        normalize_weights=not softmax and config.moe_router_topk > 1,
        softmax_after_topk=after,
        weight_scale=config.moe_router_topk_scaling_factor or 1.0,
        z_loss=config.moe_z_loss_coeff or 0.0,
        groups=config.moe_router_num_groups if config.moe_router_group_topk else 1,
        kept_groups=config.moe_router_group_topk or 1,
    )


def _capacity(config: TransformerConfig) -> CapacityConfig | None:
    factor, policy = config.moe_expert_capacity_factor, config.moe_token_drop_policy
    if factor is None:
        return None
    if policy != "probs":
        raise ValueError(
            f"moe_token_drop_policy={policy!r}: this layer would keep the tokens of the first sequences, and "
            "Megatron-Core keeps those of the first positions; use 'probs' here, or use router='megatron'"
        )
    if config.moe_pad_expert_input_to_capacity and config.moe_token_dispatcher_type != "alltoall":
        raise ValueError(
            f"moe_token_dispatcher_type={config.moe_token_dispatcher_type!r}: it does not pad, and "
            "moe_pad_expert_input_to_capacity=True; use 'alltoall'"
        )
    return CapacityConfig(factor, "probability", pad=config.moe_pad_expert_input_to_capacity)


def _dispatcher(config: TransformerConfig) -> str:
    kind = config.moe_token_dispatcher_type
    if kind == "flex" and config.moe_flex_dispatcher_backend != "deepep":
        raise ValueError(
            f"moe_flex_dispatcher_backend={config.moe_flex_dispatcher_backend!r}: only 'deepep' is available; use it, "
            "or moe_token_dispatcher_type='alltoall'"
        )
    if kind not in _DISPATCHERS:
        raise ValueError(f"moe_token_dispatcher_type={kind!r}: use one of {', '.join(_DISPATCHERS)}")
    return _DISPATCHERS[kind]


def _activation(config: TransformerConfig) -> str:
    name = _ACTIVATIONS.get(config.activation_func)
    if name is None:
        found = getattr(config.activation_func, "__name__", config.activation_func)
        raise ValueError(f"activation_func={found}: use one of silu, gelu, squared_relu")
    return name
