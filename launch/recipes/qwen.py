"""Qwen3's MoE models at their published sizes.

Learning rates, batch sizes and parallel degrees are not published. Ours, such as 4,096 sequences per step, are common
at this size.
"""

from __future__ import annotations

from ...moe.config import AttentionConfig, BalanceConfig, MoEConfig, RouterConfig
from ...moe.train.config import DataConfig, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from .common import at_scale

#: every query and key head is normalised before rotation
ATTENTION = AttentionConfig(num_kv_heads=4, head_width=128, qk_norm=True, rotary_base=1e6)
#: the coefficient and the z-loss are those of the balance loss's paper
ROUTER, BALANCE = RouterConfig(z_loss=0.001), BalanceConfig(scope="global", coefficient=0.008)


def qwen3_30b() -> TrainConfig:
    """Qwen3-30B-A3B: 30.5 billion parameters (3.3 billion active), GQA, 128 experts, for 128 ranks.

    Yang et al. 2025, arXiv 2505.09388; balance over the global batch, Qiu et al. 2025, arXiv 2501.11873. All 48 blocks
    have 128 experts of width 768, eight per token, without shared experts. Experts over 32 ranks, four pipeline stages.
    """
    return at_scale(
        steps=2_145_000,
        model=ModelConfig(num_layers=48, num_heads=32, intermediate_size=6144, vocab_size=151936, norm_eps=1e-6),
        moe=MoEConfig(2048, 768, num_experts=128, top_k=8, router=ROUTER, balance=BALANCE),
        attention=ATTENTION,
        data=DataConfig(seq_len=4096, global_batch=4096, micro_batch=1),
        optim=OptimConfig(lr=3e-4, warmup_steps=2000),
        parallel=ParallelConfig(pp=4, ep=32),
    )


def qwen3_235b() -> TrainConfig:
    """Qwen3-235B-A22B: 235 billion parameters (22 billion active), GQA, 128 experts, for 1,024 ranks.

    It follows Qwen3 (Yang et al. 2025, arXiv 2505.09388) and the paper of its balance loss (Qiu et al. 2025, arXiv
    2501.11873):

    * attention: 64 query heads of width 128 share four key/value heads; queries and keys are normalised before
      rotation;
    * layers: 94, all with 128 experts of width 1536, eight per token, and no shared experts;
    * routing: normalised softmax scores;
    * balance: the loss over the global batch; the coefficient 0.008 and the z-loss 0.001 are from the second paper;
    * data: sequences of 4,096 tokens, 36 trillion tokens in total.

    A pipeline stage has 64 ranks, with tensor parallelism over 2 and expert parallelism over 32.
    """
    return at_scale(
        steps=2_145_000,
        model=ModelConfig(num_layers=94, num_heads=64, intermediate_size=12288, vocab_size=151936, norm_eps=1e-6),
        moe=MoEConfig(4096, 1536, num_experts=128, top_k=8, router=ROUTER, balance=BALANCE),
        attention=ATTENTION,
        data=DataConfig(seq_len=4096, global_batch=4096, micro_batch=1),
        optim=OptimConfig(lr=2e-4, warmup_steps=2000),
        parallel=ParallelConfig(pp=16, tp=2, ep=32),
    )
