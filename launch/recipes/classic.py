"""GShard, Switch Transformer, BASE, X-MoE, expert choice and Soft MoE at their published sizes.

Most of these models are encoder-decoders or encoders whose feed-forwards have no gate. A recipe is a decoder with
equally many weights: as many blocks as encoder and decoder together, without attention between the two, and gated dense
feed-forwards of 2/3 of the width. It has RMSNorm and rotary positions, and AdamW instead of Adafactor.
"""

from __future__ import annotations

from ...moe.config import AttentionConfig, BalanceConfig, CapacityConfig, MoEConfig, RouterConfig
from ...moe.train.config import DataConfig, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from .common import at_scale


def gshard() -> TrainConfig:
    """GShard's largest translation model, MoE(2048E, 36L): over 600 billion parameters, top-2, for 2,048 ranks.

    Lepikhin et al. 2020, arXiv 2006.16668. Every second block has 2,048 experts, one on each rank. The load is that of
    first choices; a token's second choice is skipped at random if its weight is low; first choices claim the capacity
    2 T / E before second ones. Four million tokens per step. The embedding has the 64,000 rows of the source language,
    and the head as many as the embedding and the head of the target language, 32,000 each.
    """
    return at_scale(
        steps=250_000,
        model=ModelConfig(num_layers=36, num_heads=16, intermediate_size=5461, moe_every=2, vocab_size=64000),
        moe=MoEConfig(
            hidden_size=1024,
            intermediate_size=8192,
            num_experts=2048,
            top_k=2,
            gated=False,
            activation="gelu",
            router=RouterConfig(random_second=True),
            balance=BalanceConfig(scope="micro", coefficient=0.01, counts="first"),
            capacity=CapacityConfig(factor=1.0, drop="choice"),
        ),
        attention=AttentionConfig(head_width=128),
        data=DataConfig(seq_len=1024, global_batch=4096, micro_batch=2),
        optim=OptimConfig(lr=1e-3, warmup_steps=10_000),
        parallel=ParallelConfig(ep=2048),
    )


def switch() -> TrainConfig:
    """Switch-C: 1.57 trillion parameters, 2,048 experts in every block, top-1, for 2,048 ranks.

    Fedus et al. 2021, arXiv 2101.03961. The router's input is jittered; the gate weight is the score, without
    normalisation; the earliest tokens keep their place in an expert of capacity factor 1.25. A million tokens per step.
    """
    return at_scale(
        steps=500_000,
        model=ModelConfig(num_layers=30, num_heads=32, intermediate_size=6144, vocab_size=32128, norm_eps=1e-6),
        moe=MoEConfig(
            hidden_size=2080,
            intermediate_size=6144,
            num_experts=2048,
            top_k=1,
            gated=False,
            activation="gelu",
            router=RouterConfig(normalize_weights=False, jitter=0.01),
            balance=BalanceConfig(scope="micro", coefficient=0.01),
            capacity=CapacityConfig(factor=1.25, drop="position"),
        ),
        attention=AttentionConfig(head_width=64),
        data=DataConfig(seq_len=512, global_batch=2048, micro_batch=1),
        optim=OptimConfig(lr=1e-3, warmup_steps=10_000),
        parallel=ParallelConfig(ep=2048),
    )


def base_layers() -> TrainConfig:
    """A language model with one BASE layer: 44 billion parameters, 128 experts with equal loads, for 128 ranks.

    Lewis et al. 2021, arXiv 2103.16716. In training, the assignment of equally many tokens to every expert that has the
    highest scores; there is no balance loss. The layer is the feed-forward of one of 24 blocks, and an expert is as
    wide as the ten feed-forwards that the paper stacks in each.
    """
    return at_scale(
        steps=100_000,
        model=ModelConfig(
            num_layers=24, num_heads=16, intermediate_size=5461, moe_every=13, vocab_size=50264, tie_embeddings=True
        ),
        moe=MoEConfig(
            hidden_size=2048,
            intermediate_size=81920,
            num_experts=128,
            top_k=1,
            gated=False,
            activation="gelu",
            router=RouterConfig(score="sigmoid", select="base", normalize_weights=False),
            balance=BalanceConfig(coefficient=0.0),
        ),
        data=DataConfig(seq_len=1024, global_batch=512, micro_batch=2),
        optim=OptimConfig(lr=7.5e-4, warmup_steps=2000),
        parallel=ParallelConfig(ep=128),
    )


def xmoe() -> TrainConfig:
    """X-MoE's base model: 32 experts in one of twelve blocks, cosine routing of low rank, for 32 ranks.

    Chi et al. 2022, arXiv 2204.09179. The router compares a projection of width 16 with a direction per expert, with a
    learned temperature; the balance loss keeps the first one, 0.3. An expert is as wide as the three feed-forwards that
    the paper stacks in each. The paper trains an encoder on masked text of 94 languages.
    """
    return at_scale(
        steps=125_000,
        model=ModelConfig(
            num_layers=12, num_heads=12, intermediate_size=2048, moe_every=7, vocab_size=250002, tie_embeddings=True
        ),
        moe=MoEConfig(
            hidden_size=768,
            intermediate_size=9216,
            num_experts=32,
            top_k=1,
            gated=False,
            activation="gelu",
            router=RouterConfig(gate="cosine", normalize_weights=False),
            balance=BalanceConfig(scope="micro", coefficient=0.01),
        ),
        data=DataConfig(seq_len=512, global_batch=2048, micro_batch=16),
        optim=OptimConfig(lr=5e-4, warmup_steps=10_000),
        parallel=ParallelConfig(ep=32),
    )


def expert_choice() -> TrainConfig:
    """Expert choice 8B/64E: 143 billion parameters, 64 experts that choose two per token on average, for 256 ranks.

    Zhou et al. 2022, arXiv 2202.09368. Every expert of a rank's micro-batch chooses equally many tokens, so there is no
    balance loss. A token's experts depend on later tokens, which this recipe allows by name (``router.sees_future``);
    ``router.select="expert_choice_by_position"`` does not. Every second block has experts, whose MLPs have no gate, and
    the dense feed-forwards have one. The mesh is ours.
    """
    return at_scale(
        steps=500_000,
        model=ModelConfig(
            num_layers=32,
            num_heads=32,
            intermediate_size=16384,
            moe_every=2,
            vocab_size=256000,
            tie_embeddings=True,
        ),
        moe=MoEConfig(
            hidden_size=4096,
            intermediate_size=16384,
            num_experts=64,
            top_k=2,
            gated=False,
            activation="gelu",
            router=RouterConfig(select="expert_choice", normalize_weights=False, sees_future=True),
            balance=BalanceConfig(coefficient=0.0),
        ),
        data=DataConfig(seq_len=1024, global_batch=1024, micro_batch=2),
        optim=OptimConfig(lr=3e-4, warmup_steps=10_000),
        parallel=ParallelConfig(ep=64),
    )


def softmoe() -> TrainConfig:
    """Soft MoE B/16 with 128 experts: 3.7 billion parameters, every expert gets two mixtures of tokens, for 32 ranks.

    Puigcerver et al. 2023, arXiv 2308.00951. The last six of twelve blocks have experts. The paper's model is a vision
    transformer, whose experts have one slot each for the 196 patches of an image; as a decoder, it sees later tokens,
    which this recipe allows by name (``router.sees_future``). Slots, length, steps, mesh and vocabulary are ours.
    """
    return at_scale(
        steps=500_000,
        model=ModelConfig(
            num_layers=12,
            num_heads=12,
            intermediate_size=2048,
            dense_layers=6,
            vocab_size=32000,
            tie_embeddings=True,
        ),
        moe=MoEConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_experts=128,
            top_k=1,
            gated=False,
            activation="gelu",
            router=RouterConfig(gate="slots", slots=2, sees_future=True),
            balance=BalanceConfig(coefficient=0.0),
        ),
        data=DataConfig(seq_len=256, global_batch=4096, micro_batch=32),
        optim=OptimConfig(lr=1e-3, warmup_steps=10_000),
        parallel=ParallelConfig(ep=32),
    )
