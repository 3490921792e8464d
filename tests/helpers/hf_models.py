"""Tiny random models of transformers, one per family of MoE models, and a batch with padding on both sides."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY, LENGTH = 40, 9
#: ranks that share a batch
WORLD = 2
_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
}
_QWEN = {"num_experts": 6, "intermediate_size": 24, "moe_intermediate_size": 24}
_LOCAL = {"num_local_experts": 6, "intermediate_size": 24}
_GROUPS = {"n_group": 4, "topk_group": 1, "routed_scaling_factor": 2.5}

#: family, and a variant of it -> the prefix of its classes, and settings
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", _LOCAL),
    "mixtral gelu": ("Mixtral", _LOCAL | {"hidden_act": "gelu"}),
    "mixtral relu": ("Mixtral", _LOCAL | {"hidden_act": "relu"}),  # not an activation of this package
    "qwen2": ("Qwen2Moe", _QWEN | {"shared_expert_intermediate_size": 20}),
    "qwen3": ("Qwen3Moe", _QWEN | {"head_dim": 8, "norm_topk_prob": True}),
    "qwen3 plain": ("Qwen3Moe", _QWEN | {"head_dim": 8, "norm_topk_prob": False, "decoder_sparse_step": 2}),
    "olmoe": ("Olmoe", {"num_experts": 6, "intermediate_size": 24}),
    "deepseek v2": ("DeepseekV2", _LATENT | _GROUPS | {"topk_method": "group_limited_greedy"}),
    "deepseek v2 lite": ("DeepseekV2", _LATENT | {"topk_method": "greedy", "routed_scaling_factor": 1.0}),
    "deepseek v3": ("DeepseekV3", _LATENT | _GROUPS),
    "deepseek v3 plain": ("DeepseekV3", _LATENT | _GROUPS | {"norm_topk_prob": False}),
    "granite": ("GraniteMoe", _LOCAL),
    "phimoe": ("Phimoe", _LOCAL),
    "gpt-oss": ("GptOss", _LOCAL | {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
}

#: the same of dense models
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    name: (prefix, {"intermediate_size": 24} | own)
    for name, prefix, own in (
        ("llama", "Llama", {}),
        ("mistral", "Mistral", {"sliding_window": 5}),
        ("dense qwen2", "Qwen2", {}),
        ("dense qwen3", "Qwen3", {"head_dim": 8}),
    )
}


def build(family: str, **settings: Any) -> Any:
    """Return the model, in training mode; the same one for the same arguments."""
    prefix, own = (FAMILIES | DENSE)[family]
    config = getattr(transformers, f"{prefix}Config")(**{**_BASE, **own, **settings})
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.2)
    return model.train()


def batch(seed: int = 0, rows: int = 2, padded: bool = True) -> dict[str, Tensor]:
    """Return inputs and labels. If ``padded``, the first row has padding on its left, and the last row on its right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :2], mask[-1, -3:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def whole() -> dict[str, Tensor]:
    """Return the batch of all ranks, with padding in the first rank's part."""
    parts = [batch(seed=rank, padded=rank == 0) for rank in range(WORLD)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def part(rank: int) -> dict[str, Any]:
    """Return a rank's part of :func:`whole`, whose losses have the loss of the whole as their mean."""
    predicted = int((whole()["labels"][:, 1:] >= 0).sum())
    own = {name: value.chunk(WORLD)[rank] for name, value in whole().items()}
    return own | {"num_items_in_batch": predicted / WORLD}


def gradients(model: Any, inputs: dict[str, Tensor] | None = None) -> tuple[Any, dict[str, Tensor]]:
    """Return a forward's outputs and its gradients, with the same random numbers in every call."""
    torch.manual_seed(1)
    model.zero_grad()
    outputs = model(**(batch() if inputs is None else inputs))
    outputs.loss.backward()
    return outputs, {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
