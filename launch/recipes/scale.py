"""Makes a recipe small enough to train on two CPU cores within a minute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from ...moe.config import AttentionConfig, MoEConfig
from ...moe.train.config import CheckpointConfig, LogConfig, OptimConfig, ParallelConfig, TrainConfig

Scale = Literal["full", "tiny"]
#: width of the hidden states, and attention heads
HIDDEN, HEADS = 64, 4
#: most experts of a layer, and tokens of a sequence
EXPERTS, SEQUENCE = 16, 64


def tiny(config: TrainConfig) -> TrainConfig:
    """Return a run that routes, weighs, drops and balances as ``config`` does, with a small model of bytes.

    A token is sent to about the same share of the experts, but to at least two if ``config`` sends it to several.
    Widths keep their ratios, up to four times the hidden width. Dense blocks, blocks without experts, shared experts,
    latent and grouped-query attention stay, each in its smallest form. The mesh is data and expert parallelism over all
    ranks.
    """
    dense, every = min(config.model.dense_layers, 1), min(config.model.moe_every, 3)
    model = replace(
        config.model,
        num_layers=dense + max(2, every),
        dense_layers=dense,
        moe_every=every,
        num_heads=HEADS,
        intermediate_size=_width(config.model.intermediate_size, config),
        vocab_size=None,
        recompute=False,
    )
    return replace(
        config,
        steps=100,
        dtype="float32",
        model=model,
        moe=_moe(config),
        attention=_attention(config),
        data=replace(config.data, seq_len=SEQUENCE, global_batch=16, micro_batch=4, builtin_bytes_per_domain=300_000),
        optim=OptimConfig(lr=3e-3, schedule=config.optim.schedule, warmup_steps=5),
        parallel=ParallelConfig(ep=-1),
        checkpoint=CheckpointConfig(every=0),
        log=LogConfig(every=10, eval_every=50, eval_sequences=8),
    )


def _width(width: int, config: TrainConfig) -> int:
    """Return a width with the same ratio to the hidden width: a multiple of 8, at most four times the latter."""
    return min(max(8 * round(width * HIDDEN / config.moe.hidden_size / 8), 16), 4 * HIDDEN)


def _moe(config: TrainConfig) -> MoEConfig:
    moe, router = config.moe, config.moe.router
    experts = min(moe.num_experts, EXPERTS)
    top_k = max(round(moe.top_k * experts / moe.num_experts), min(moe.top_k, 2))
    if router.select == "each_group":  # as many choices of every group
        groups = max(top_k * router.groups // moe.top_k, 1)
        top_k, router = groups * (moe.top_k // router.groups), replace(router, groups=groups)
    router = replace(router, random_steps=min(router.random_steps, 5), slots=min(router.slots, SEQUENCE // experts))
    width, widths = _width(moe.intermediate_size, config), None
    if moe.widths is not None:
        of_experts = [8 * round(one * HIDDEN / moe.hidden_size / 8) for one in moe.expert_widths]
        width, widths = sum(of_experts) // experts, ",".join(map(str, of_experts))
    return replace(
        moe,
        hidden_size=HIDDEN,
        intermediate_size=width,
        widths=widths,
        num_experts=experts,
        top_k=top_k,
        router=router,
        shared_intermediate_size=width * round(moe.shared_intermediate_size / moe.intermediate_size),
    )


def _attention(config: TrainConfig) -> AttentionConfig:
    attention, heads = config.attention, config.model.num_heads
    kv_heads = attention.num_kv_heads
    return replace(
        attention,
        num_kv_heads=None if kv_heads is None else max(HEADS * kv_heads // heads, 1),
        head_width=None,
        window=None,
        q_lora_rank=min(attention.q_lora_rank, 24),
        kv_lora_rank=16,
        qk_nope_width=16,
        qk_rope_width=8,
        v_width=16,
    )


def full(config: TrainConfig) -> TrainConfig:
    """Return the recipe as it is."""
    return config


#: what ``--scale`` makes of a recipe
SCALES: dict[Scale, Callable[[TrainConfig], TrainConfig]] = {"full": full, "tiny": tiny}
