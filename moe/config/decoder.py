"""Configuration of the decoder around the layer: attention, and what the backward pass recomputes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .checks import check_literals, require


@dataclass(frozen=True)
class RotaryScaling:
    """Rotary positions for sequences that are longer than those of pretraining, by slower turns."""

    #: which channel pairs turn slower. linear: all, by the factor (arXiv 2306.15595); yarn: those that turn fewer than
    #: ``slow_turns`` times over ``original_length``, and in part those up to ``fast_turns`` (arXiv 2309.00071); llama3:
    #: the same with another transition (arXiv 2407.21783)
    kind: Literal["linear", "yarn", "llama3"] = "yarn"
    #: length of sequences, relative to those of pretraining
    factor: float = 4.0
    #: for "yarn" and "llama3": length of the sequences of pretraining
    original_length: int = 4096
    #: for "yarn" and "llama3": pairs with more turns than this are left alone; 32 and 4 are usual
    fast_turns: float = 32.0
    #: for "yarn" and "llama3": pairs with fewer turns than this get the whole factor
    slow_turns: float = 1.0
    #: multiply sines and cosines by this number; none: 0.1 ln(factor) + 1 for "yarn", else 1
    table_scale: float | None = None
    #: multiply the scores of attention by this number (DeepSeek-V2 and V3)
    score_scale: float = 1.0

    @property
    def magnitude(self) -> float:
        """The factor of sines and cosines."""
        if self.table_scale is not None:
            return self.table_scale
        return 0.1 * math.log(self.factor) + 1.0 if self.kind == "yarn" else 1.0

    def __post_init__(self) -> None:
        check_literals(self, "attention.scaling.")
        require(self.factor >= 1, "attention.scaling.factor", self.factor, "must be at least 1")
        require(
            self.original_length >= 1, "attention.scaling.original_length", self.original_length, "must be positive"
        )
        require(
            self.fast_turns > self.slow_turns > 0,
            "attention.scaling.fast_turns",
            self.fast_turns,
            f"must be more than slow_turns={self.slow_turns}, and both positive",
        )
        for name in ("table_scale", "score_scale"):
            value = getattr(self, name)
            require(value is None or value > 0, f"attention.scaling.{name}", value, "must be positive")


@dataclass(frozen=True)
class AttentionConfig:
    """The attention of the decoder's blocks."""

    #: grouped: multi-head or grouped-query attention; latent: multi-head latent attention (DeepSeek-V2 and V3)
    kind: Literal["grouped", "latent"] = "grouped"
    #: for "grouped": number of key/value heads; none: one per query head
    num_kv_heads: int | None = None
    #: for "grouped": width of a head; none: moe.hidden_size / model.num_heads
    head_width: int | None = None
    #: for "grouped": apply RMSNorm to queries and keys
    qk_norm: bool = False
    #: for ``qk_norm``: over each head (Qwen3), or over all heads together (OLMoE)
    qk_norm_over: Literal["head", "all_heads"] = "head"
    #: projections with a bias: those of queries, keys and values (Qwen2; for "latent": those to the latents), or also
    #: that of the output
    bias: Literal["none", "inputs", "all"] = "none"
    #: number of positions that a position attends to, itself included; none: all earlier ones
    window: int | None = None
    #: the first n blocks have no window
    window_from: int = 0
    #: rotary base: pair i of R rotated channels turns by position / rotary_base^(2i/R)
    rotary_base: float = 10000.0
    #: for longer sequences than those of pretraining; none: off
    scaling: RotaryScaling | None = None
    #: for "latent": width of the query latent; 0: project queries directly from the hidden state
    q_lora_rank: int = 1536
    #: for "latent": width of the latent that keys and values share
    kv_lora_rank: int = 512
    #: for "latent": width of the part of each head's query and key without rotary positions
    qk_nope_width: int = 128
    #: for "latent": width of the part of each head's query and key with rotary positions
    qk_rope_width: int = 64
    #: for "latent": width of each head's value
    v_width: int = 128

    def window_of(self, block: int) -> int | None:
        """Return the window of a block."""
        return self.window if block >= self.window_from else None

    def __post_init__(self) -> None:
        check_literals(self, "attention.")
        for name in (
            "num_kv_heads",
            "head_width",
            "window",
            "kv_lora_rank",
            "qk_nope_width",
            "qk_rope_width",
            "v_width",
        ):
            value = getattr(self, name)
            require(value is None or value >= 1, f"attention.{name}", value, "must be at least 1")
        require(self.window_from >= 0, "attention.window_from", self.window_from, "must not be negative")
        require(self.q_lora_rank >= 0, "attention.q_lora_rank", self.q_lora_rank, "must not be negative; 0: no latent")
        require(self.rotary_base > 1, "attention.rotary_base", self.rotary_base, "must be more than 1; 10000 is usual")
        for name in ("head_width", "qk_rope_width"):
            value = getattr(self, name)
            require(value is None or value % 2 == 0, f"attention.{name}", value, "must be even; channels turn in pairs")

    def check(self, hidden_size: int, num_heads: int) -> None:
        """Raise ``ValueError`` if these sizes do not divide evenly into heads."""
        if self.kind == "latent":
            return
        kv_heads = self.num_kv_heads or num_heads
        require(
            num_heads % kv_heads == 0, "attention.num_kv_heads", kv_heads, f"must divide model.num_heads={num_heads}"
        )
        require(
            self.head_width is not None or hidden_size % (2 * num_heads) == 0,
            "model.num_heads",
            num_heads,
            f"2 * num_heads must divide moe.hidden_size={hidden_size} (rotary embedding splits each head in half); "
            "change one of them, or set attention.head_width",
        )


@dataclass(frozen=True)
class RecomputeConfig:
    """What the backward pass recomputes if ``model.recompute`` is on. Routing decisions are always kept."""

    #: recompute whole blocks, or only their attention or feed-forward together with its norm
    part: Literal["block", "attention", "feed_forward"] = "block"
    #: recompute only the first n blocks; none: all blocks
    layers: int | None = None
    #: keep dispatched and combined rows, so that recomputation needs no communication: 4 instead of 6 exchanges per
    #: layer, at a cost of about 2 K rows of memory per token (DeepSpeed-TED, arXiv 2303.06318)
    keep_exchanges: bool = False

    def __post_init__(self) -> None:
        check_literals(self, "recompute.")
        require(self.layers is None or self.layers >= 0, "recompute.layers", self.layers, "must not be negative")
