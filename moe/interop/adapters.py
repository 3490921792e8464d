"""What :func:`~equimoe.moe.interop.swap` must know about an MoE block of another library: an :class:`Adapter` for each.

T tokens, D hidden, E experts, F expert width, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import RouterConfig

#: transformers' ``hidden_act`` -> ``MoEConfig.activation``; experts with another activation compute with their own code
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True)
class Adapter:
    """Describes an MoE block: where its parts are, and how it routes.

    The functions are called with the block, and some with the model's ``config`` (None if it has none).
    """

    #: (block, config) -> top-k and the settings of the router
    routing: Callable[[Any, Any], tuple[int, RouterConfig]]
    #: name of the submodule with the router's ``weight`` [E, D], and ``bias`` [E] if it has one
    router: str = "gate"
    #: name of the submodule with the experts' ``gate_up_proj`` [E, 2F, D], gate rows first, and ``down_proj`` [E, D, F]
    experts: str = "experts"
    #: block -> these two tensors, if no submodule has them. It runs in every forward and must be differentiable
    weights: Callable[[Any], tuple[Tensor, Tensor]] | None = None
    #: (block, config) -> the experts' activation, as in ``MoEConfig.activation``; None: the submodule ``experts``
    #: computes with its own code. It is called with tokens [T, D], expert ids [T, K] and gate weights [T, K]
    activation: Callable[[Any, Any], str | None] = lambda block, config: "silu"
    #: (block, tokens [T, D]) -> what the shared experts add [T, D]; None: there are none
    shared: Callable[[Any, Tensor], Tensor] | None = None
    #: name of the router's buffer with the expert bias [E]; None: there is none
    bias: str | None = None
    #: the router computes with its own code: tokens [T, D] -> logits [T, E], gate weights [T, K] and expert ids [T, K]
    own_router: bool = False
    #: output [..., D] -> what the block returns
    output: Callable[[Tensor], Any] = lambda y: y
    #: names of settings of the block that must be zero or absent, because the layer has no such thing
    refused: tuple[str, ...] = ()
    #: name of the attention next to the block, to which the model passes its keyword arguments: the padding mask comes
    #: with them. None: there is none; then call the block with ``mask``
    attention: str | None = "self_attn"


def _activation(block: Any, config: Any) -> str | None:
    return ACTIVATIONS.get(config.hidden_act)


# ---- how each family routes


def _mixtral(block: Any, config: Any) -> tuple[int, RouterConfig]:
    return config.num_experts_per_tok, RouterConfig()


def _qwen(block: Any, config: Any) -> tuple[int, RouterConfig]:
    return config.num_experts_per_tok, RouterConfig(normalize_weights=config.norm_topk_prob)


def _deepseek_v2(block: Any, config: Any) -> tuple[int, RouterConfig]:
    grouped = config.topk_method == "group_limited_greedy"
    return config.num_experts_per_tok, RouterConfig(
        normalize_weights=False,
        weight_scale=config.routed_scaling_factor,
        groups=config.n_group if grouped else 1,
        kept_groups=config.topk_group if grouped else 1,
        group_worth="best",
    )


def _deepseek_v3(block: Any, config: Any) -> tuple[int, RouterConfig]:
    return config.num_experts_per_tok, RouterConfig(
        score="sigmoid",
        normalize_weights=config.norm_topk_prob,
        weight_scale=config.routed_scaling_factor,
        groups=config.n_group,
        kept_groups=config.topk_group,
    )


def _after_topk(block: Any, config: Any) -> tuple[int, RouterConfig]:
    return config.num_experts_per_tok, RouterConfig(softmax_after_topk=True)


def _sparse_mixer(block: Any, config: Any) -> tuple[int, RouterConfig]:
    return 2, RouterConfig(softmax_after_topk=True)  # whatever the configuration says


# ---- what the shared experts of a family add


def _gated_expert(block: Any, x_TD: Tensor) -> Tensor:
    return torch.sigmoid(block.shared_expert_gate(x_TD)) * block.shared_expert(x_TD)


def _shared_experts(block: Any, x_TD: Tensor) -> Tensor:
    return block.shared_experts(x_TD)


#: class name of the block in transformers -> its adapter
ADAPTERS: dict[str, Adapter] = {
    "MixtralSparseMoeBlock": Adapter(_mixtral, activation=_activation, refused=("jitter_noise",)),
    "Qwen2MoeSparseMoeBlock": Adapter(_qwen, activation=_activation, shared=_gated_expert),
    "Qwen3MoeSparseMoeBlock": Adapter(_qwen, activation=_activation),
    "OlmoeSparseMoeBlock": Adapter(_qwen, activation=_activation),
    "DeepseekV2Moe": Adapter(_deepseek_v2, activation=_activation, shared=_shared_experts),
    "DeepseekV3MoE": Adapter(
        _deepseek_v3, activation=_activation, shared=_shared_experts, bias="e_score_correction_bias"
    ),
    "GraniteMoeMoE": Adapter(_after_topk, activation=_activation, router="router"),
    "PhimoeSparseMoeBlock": Adapter(
        _sparse_mixer, activation=_activation, router="router", own_router=True, refused=("input_jitter_noise",)
    ),
    # the experts have biases and a clamped activation, so they compute with their own code
    "GptOssMLP": Adapter(
        _after_topk, router="router", activation=lambda block, config: None, output=lambda y: (y, None)
    ),
}
