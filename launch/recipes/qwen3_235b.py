"""Qwen3-235B-A22B at its published size."""

from __future__ import annotations

from ...moe.config import AttentionConfig, BalanceConfig, MoEConfig, RouterConfig
from ...moe.train.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
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

    Learning rate, batch size and parallel degrees are not published. Ours, such as 4,096 sequences per step, are common
    at this size. A pipeline stage has 64 ranks, with tensor parallelism over 2 and expert parallelism over 32.
    """
    return TrainConfig(
        steps=2_145_000,
        dtype="bfloat16",
        model=ModelConfig(
            num_layers=94, num_heads=64, intermediate_size=12288, vocab_size=151936, norm_eps=1e-6, recompute=True
        ),
        moe=MoEConfig(
            hidden_size=4096,
            intermediate_size=1536,
            num_experts=128,
            top_k=8,
            router=RouterConfig(score="softmax", normalize_weights=True, z_loss=0.001),
            balance=BalanceConfig(scope="global", coefficient=0.008),
        ),
        attention=AttentionConfig(num_kv_heads=4, head_width=128, qk_norm=True, rotary_base=1e6),
        data=DataConfig(seq_len=4096, global_batch=4096, micro_batch=1),
        optim=OptimConfig(lr=2e-4, schedule="cosine", warmup_steps=2000),
        parallel=ParallelConfig(pp=16, tp=2, ep=32, data_parallel="fsdp", timeout_s=1800.0),
        checkpoint=CheckpointConfig(every=500),
        log=LogConfig(every=10, eval_every=1000, eval_sequences=64),
    )
