"""The configurations of transformers' MoE models, and the decoder of this package that computes the same.

A :class:`Family` reads the content of a ``config.json`` as an :class:`Architecture`, and writes one. What the decoder
does not have is refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..architecture import Architecture
from ..given import Given
from .common import Family
from .deepseek import read_v2, read_v3, write_v2, write_v3
from .mixtral import read_llama, read_mistral, read_mixtral, write_llama, write_mistral, write_mixtral
from .qwen import (
    read_dense_qwen2,
    read_dense_qwen3,
    read_olmoe,
    read_qwen2,
    read_qwen3,
    write_dense_qwen2,
    write_dense_qwen3,
    write_olmoe,
    write_qwen2,
    write_qwen3,
)

#: ``model_type`` of a ``config.json`` -> family
FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        "MixtralForCausalLM", read_mixtral, write_mixtral, block="block_sparse_moe", expert=("w1", "w3", "w2")
    ),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", read_qwen3, write_qwen3),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", read_qwen2, write_qwen2, shared="shared_expert", empty_shared=True),
    "olmoe": Family("OlmoeForCausalLM", read_olmoe, write_olmoe),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", read_v2, write_v2, interleaved=True),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", read_v3, write_v3, interleaved=True, expert_bias=True),
    "llama": Family("LlamaForCausalLM", read_llama, write_llama, dense=True),
    "mistral": Family("MistralForCausalLM", read_mistral, write_mistral, dense=True),
    "qwen2": Family("Qwen2ForCausalLM", read_dense_qwen2, write_dense_qwen2, dense=True),
    "qwen3": Family("Qwen3ForCausalLM", read_dense_qwen3, write_dense_qwen3, dense=True),
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
        if family.dense != wanted.is_dense:
            continue
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
        theirs = found.fields()
        odd = [f"{name}={value!r}" for name, value in wanted.fields().items() if value != theirs.get(name)]
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
