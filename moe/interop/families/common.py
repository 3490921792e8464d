"""What the families of models have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...config import AttentionConfig, MoEConfig
from ..adapters import ACTIVATIONS
from ..architecture import Architecture, canonical, no_moe
from ..given import Given, rotary, written_rotary


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
    #: whether no block has experts
    dense: bool = False
    #: whether files have the tensors of a shared expert of width 0, which transformers builds
    empty_shared: bool = False


def architecture(
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


def dense(c: Given, attention: AttentionConfig) -> Architecture:
    """Return the architecture of a model without experts."""
    silu(c, "dense feed-forwards")
    c.only("mlp_bias", (False,), "feed-forwards of this decoder have no biases")
    width = c.whole("intermediate_size")
    return architecture(c, no_moe(c.whole("hidden_size"), width), attention, (0, 0), intermediate_size=width)


def silu(c: Given, what: str) -> str:
    if (found := c.activation()) != "silu":
        raise c.error("hidden_act", f"{what} of this decoder have silu; only models without them may have another one")
    return found


def grouped(c: Given, rotary_base: float, head_width: int | None = None, **more: Any) -> AttentionConfig:
    """``head_width``: that of a file that does not say it."""
    base, scaling = rotary(c, rotary_base)
    heads, hidden = c.whole("num_attention_heads"), c.whole("hidden_size")
    found = AttentionConfig(
        num_kv_heads=c.whole("num_key_value_heads", default=heads),
        head_width=c.whole("head_dim", default=head_width or hidden // heads),
        rotary_base=base,
        scaling=scaling,
        **more,
    )
    found.check(hidden, heads)
    return found


def biases(c: Given) -> dict[str, Any]:
    return {"bias": "all" if c.flag("attention_bias") else "none"}


def written(a: Architecture) -> dict[str, Any]:
    names = {value: name for name, value in reversed(ACTIVATIONS.items())}
    sizes = {"intermediate_size": a.intermediate_size} if a.is_dense else {"num_experts_per_tok": a.moe.top_k}
    return sizes | {
        "hidden_size": a.moe.hidden_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.attention.num_kv_heads or a.num_heads,
        "hidden_act": names.get(a.moe.activation, a.moe.activation),
        "rms_norm_eps": a.norm_eps,
        "tie_word_embeddings": a.tie_embeddings,
        "vocab_size": a.vocab_size,
        **written_rotary(a.attention),
    }
