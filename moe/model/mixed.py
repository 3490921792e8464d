"""Turns a dense decoder into one whose feed-forwards are LoRA experts (MixLoRA) or merged linear experts (MEO)."""

from __future__ import annotations

from dataclasses import replace

from ..config import MoEConfig
from ..config.checks import require
from ..config.routing import in_decoder
from ..experts import LOW_RANK, MergedSwiGLU, SwiGLU
from ..layer import MoE
from .decoder import Decoder


def mix_lora(
    model: Decoder, config: MoEConfig, rank: int = 8, alpha: float = 16.0, experts: str = "lora", **how: int
) -> Decoder:
    """Replace each dense feed-forward by an MoE layer of LoRA experts over it, in place, and freeze all other weights.

    ``config`` describes the layers; with ``router.normalize_weights``, the model computes at first what it did before
    (MixLoRA, arXiv 2404.15159). Only routers and experts are trained. ``experts="shards"`` shares the experts' weights
    in shards (MoS, arXiv 2410.00938), and ``how`` are its further settings, see
    :class:`equimoe.moe.experts.ShardedLoRAExperts`. Raises ValueError for settings that do not fit.
    """
    require(experts in LOW_RANK, "experts", experts, f"must be one of {', '.join(LOW_RANK)}")
    plain = MoEConfig
    for name, wanted in (
        ("activation", plain.activation),
        ("gated", plain.gated),
        ("recompute_experts", False),
        ("widths", None),
    ):
        value = getattr(config, name)
        require(value == wanted, f"moe.{name}", value, f"LoRA experts are SwiGLU experts; set it to {wanted!r}")
    config = replace(config, router=in_decoder(config.router, model.vocab_size))
    model.serve_routers(config.router.gate)
    model.requires_grad_(False)
    for name, block in model.blocks.items():
        base = block.mlp
        if not isinstance(base, SwiGLU):
            continue
        width, hidden = base.gate_proj.weight.shape
        require(config.hidden_size == hidden, "moe.hidden_size", config.hidden_size, f"block {name} has {hidden}")
        remedy = f"the feed-forward of block {name} has {width}"
        require(config.intermediate_size == width, "moe.intermediate_size", config.intermediate_size, remedy)
        layer = MoE(config).to(base.gate_proj.weight)
        layer.add_module("experts", LOW_RANK[experts](base, config.num_experts, rank, alpha, config.backend, **how))
        block.mlp = layer
    return model


def merge_experts(
    model: Decoder, num_experts: int, top_k: int, segment: int | None = 64, sees_future: bool = False
) -> Decoder:
    """Replace each dense feed-forward by one of merged linear experts with new weights, in place (arXiv 2310.09832).

    Each ``segment`` positions of a sequence share merged weights, which routers choose from the mean of all positions
    before them, also those of earlier documents in the sequence. With ``segment=None`` they choose from the whole
    sequence. A decoder would then see what it is to predict, so this needs ``sees_future=True``. No balance loss is
    attached: :func:`equimoe.moe.experts.importance_loss` computes the paper's. For data parallelism, FSDP and
    pipelines; sequences cannot be split over ranks, and text cannot be generated with a key/value cache.
    """
    remedy = "lets each position see later ones, which a decoder is to predict; give a length, or set sees_future=True"
    require(segment is not None or sees_future, "segment", segment, remedy)
    for block in model.blocks.values():
        if isinstance(block.mlp, SwiGLU):
            like = block.mlp.gate_proj.weight
            width, hidden = like.shape
            block.mlp = MergedSwiGLU(hidden, width, num_experts, top_k, segment, block.mlp.init_std).to(like)
    return model
