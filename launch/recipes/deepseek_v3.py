"""DeepSeek-V3 at its published size."""

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


def deepseek_v3() -> TrainConfig:
    """DeepSeek-V3: 671 billion parameters (37 billion active), latent attention, 256 narrow experts, for 1,024 ranks.

    It follows DeepSeek-V3 (DeepSeek-AI 2024, arXiv 2412.19437, sections 2 and 4):

    * attention: multi-head latent attention with 128 heads; queries and keys of width 128 + 64 (rotated), values of
      128, latents of 1536 and 512;
    * layers: 3 dense ones, then 58 with one shared and 256 routed experts of width 2048, eight per token;
    * routing: sigmoid scores; each token chooses from its four best of eight groups; gate weights sum to 2.5;
    * balance: expert bias with step size 0.001, and the sequence loss with coefficient 0.0001;
    * data: 15,360 sequences of 4,096 tokens per step, 14.8 trillion tokens in total;
    * optimizer: AdamW with betas 0.9 and 0.95, weight decay 0.1, gradients clipped to norm 1; learning rate 2.2e-4
      after 2,000 steps of warm-up, decaying at the end;
    * parallelism: 16 pipeline stages, experts over 64 ranks.

    It differs from the paper in that it has no multi-token prediction, no FP8, no batch-size warm-up, and no DualPipe:
    it uses the 1F1B schedule and recomputes blocks.
    """
    return TrainConfig(
        steps=235_000,
        dtype="bfloat16",
        model=ModelConfig(
            num_layers=61,
            num_heads=128,
            intermediate_size=18432,
            dense_layers=3,
            vocab_size=129280,
            norm_eps=1e-6,
            recompute=True,
        ),
        moe=MoEConfig(
            hidden_size=7168,
            intermediate_size=2048,
            num_experts=256,
            top_k=8,
            shared_intermediate_size=2048,
            router=RouterConfig(score="sigmoid", normalize_weights=True, weight_scale=2.5, groups=8, kept_groups=4),
            balance=BalanceConfig(scope="sequence", coefficient=1e-4, bias_update_rate=0.001),
        ),
        attention=AttentionConfig(
            kind="latent", q_lora_rank=1536, kv_lora_rank=512, qk_nope_width=128, qk_rope_width=64, v_width=128
        ),
        data=DataConfig(seq_len=4096, global_batch=15360, micro_batch=1),
        optim=OptimConfig(lr=2.2e-4, schedule="wsd", warmup_steps=2000, decay_fraction=0.3, min_lr_ratio=0.1),
        parallel=ParallelConfig(pp=16, ep=64, data_parallel="fsdp", timeout_s=1800.0),
        checkpoint=CheckpointConfig(every=500),
        log=LogConfig(every=10, eval_every=1000, eval_sequences=64),
    )
