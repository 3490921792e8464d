"""Folders as transformers writes them, with random weights and without that library."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from equimoe.moe.interop.families import FAMILIES, read_config
from equimoe.moe.interop.names import Layout, names, theirs

_COMMON = {
    "hidden_act": "silu",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 40,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_experts_per_tok": 2,
}
_LATENT = {
    **{"q_lora_rank": 6, "kv_lora_rank": 5, "qk_nope_head_dim": 4, "qk_rope_head_dim": 6, "v_head_dim": 3},
    **{"n_routed_experts": 4, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
}
#: family -> the fields of its configuration that the others do not have
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_key_value_heads": 2},
    "qwen2_moe": {"num_experts": 4, "num_key_value_heads": 2, "shared_expert_intermediate_size": 20},
    "qwen3_moe": {"num_experts": 4, "num_key_value_heads": 2, "head_dim": 6, "norm_topk_prob": True},
    "olmoe": {"num_experts": 4, "num_key_value_heads": 2},
    "deepseek_v2": _LATENT | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": _LATENT | {"tie_word_embeddings": True},
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 5},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 6},
}


def config(kind: str, **settings: Any) -> dict[str, Any]:
    """Return the content of a ``config.json``."""
    return {"model_type": kind, "dtype": "float32"} | _COMMON | CONFIGS[kind] | settings


def tensors(values: dict[str, Any], layout: Layout = "v4", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the model's tensors. An expert bias is fp32."""
    kind, found = read_config(values, "config.json")
    torch.manual_seed(0)
    shapes = {name: shape for name, (shape, _) in theirs(names(FAMILIES[kind], found, layout)).items()}
    made = {name: 0.5 * torch.randn(shape) + ("norm" in name) for name, shape in shapes.items()}
    return {name: t if name.endswith("correction_bias") else t.to(dtype) for name, t in made.items()}


def write(folder: Path, values: dict[str, Any], weights: dict[str, Tensor], files: int = 1) -> Path:
    """Write a model, in several files with an index; return ``folder``."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    if files == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder
    places = {}
    for number, part in enumerate(_parts(sorted(weights), files), 1):
        file = f"model-{number:05d}-of-{files:05d}.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder."""
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Check that names, dtypes and bits are the same."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def _parts(items: list[str], number: int) -> Iterable[list[str]]:
    each = math.ceil(len(items) / number)
    return (items[i * each : (i + 1) * each] for i in range(number))
