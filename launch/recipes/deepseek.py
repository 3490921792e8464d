"""DeepSeekMoE 16B, DeepSeek-V2, DeepSeek-V3, and Kimi K2, which follows them, at their published sizes."""

from __future__ import annotations

from dataclasses import replace

from ...moe.config import AttentionConfig, BalanceConfig, CapacityConfig, ExtraLossConfig, MoEConfig, RouterConfig
from ...moe.train.config import DataConfig, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from .common import at_scale

LATENT = AttentionConfig(
    kind="latent", q_lora_rank=1536, kv_lora_rank=512, qk_nope_width=128, qk_rope_width=64, v_width=128
)


def deepseekmoe_16b() -> TrainConfig:
    """DeepSeekMoE 16B: 16.4 billion parameters (2.8 billion active), two shared experts and 6 of 64 narrow ones.

    Dai et al. 2024, arXiv 2401.06066. Gate weights are softmax scores, without normalisation. As in the paper, a
    layer's experts are all on one rank, and a weak loss of coefficient 0.001 balances them; 4,608 sequences per step.
    The first block is dense. For 64 ranks, in four pipeline stages; the paper does not give their number.
    """
    return at_scale(
        steps=106_449,
        model=ModelConfig(
            num_layers=28, num_heads=16, intermediate_size=10944, dense_layers=1, vocab_size=102400, norm_eps=1e-6
        ),
        moe=MoEConfig(
            hidden_size=2048,
            intermediate_size=1408,
            num_experts=64,
            top_k=6,
            shared_intermediate_size=2 * 1408,
            router=RouterConfig(normalize_weights=False),
            balance=BalanceConfig(scope="micro", coefficient=0.001),
        ),
        data=DataConfig(seq_len=4096, global_batch=4608, micro_batch=1),
        optim=OptimConfig(lr=4.2e-4, schedule="wsd", warmup_steps=2000),
        parallel=ParallelConfig(pp=4),
    )


def deepseek_v2() -> TrainConfig:
    """DeepSeek-V2: 236 billion parameters (21 billion active), latent attention, 160 experts, for 1,024 ranks.

    DeepSeek-AI 2024, arXiv 2405.04434. Each token chooses six experts from its three best of eight groups, one per
    expert-parallel rank; gate weights are scores times 16. Losses of 0.003, 0.05 and 0.02 balance experts, ranks and
    what they receive; each rank drops choices of low weight beyond its fair share. 16 pipeline stages, experts over 8
    ranks. The paper trains the first steps on smaller batches, and drops nothing in a tenth of the sequences.
    """
    return at_scale(
        steps=214_600,
        model=ModelConfig(
            num_layers=60, num_heads=128, intermediate_size=12288, dense_layers=1, vocab_size=102400, norm_eps=1e-6
        ),
        moe=MoEConfig(
            hidden_size=5120,
            intermediate_size=1536,
            num_experts=160,
            top_k=6,
            shared_intermediate_size=2 * 1536,
            router=RouterConfig(
                normalize_weights=False, weight_scale=16.0, groups=8, kept_groups=3, group_worth="best"
            ),
            balance=BalanceConfig(
                scope="sequence", coefficient=0.003, extra=ExtraLossConfig(device=0.05, communication=0.02)
            ),
            capacity=CapacityConfig(factor=1.0, level="device"),
        ),
        attention=LATENT,
        data=DataConfig(seq_len=4096, global_batch=9216, micro_batch=1),
        optim=OptimConfig(lr=2.4e-4, schedule="wsd", warmup_steps=2000),
        parallel=ParallelConfig(pp=16, ep=8),
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
    return at_scale(
        steps=235_000,
        model=ModelConfig(
            num_layers=61, num_heads=128, intermediate_size=18432, dense_layers=3, vocab_size=129280, norm_eps=1e-6
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
        attention=LATENT,
        data=DataConfig(seq_len=4096, global_batch=15360, micro_batch=1),
        optim=OptimConfig(lr=2.2e-4, schedule="wsd", warmup_steps=2000, decay_fraction=0.3, min_lr_ratio=0.1),
        parallel=ParallelConfig(pp=16, ep=64),
    )


def kimi_k2() -> TrainConfig:
    """Kimi K2: 1.04 trillion parameters (32.6 billion active), like DeepSeek-V3 with 384 experts, for 1,024 ranks.

    Kimi Team 2025, arXiv 2507.20534. One dense block, half as many heads, no groups of experts; gate weights sum to
    2.827. 67 million tokens per step. 16 pipeline stages, experts over 16 ranks. The paper trains with MuonClip instead
    of AdamW. It does not publish how it balances; this recipe does it as DeepSeek-V3.
    """
    return at_scale(
        steps=231_000,
        model=ModelConfig(
            num_layers=61, num_heads=64, intermediate_size=18432, dense_layers=1, vocab_size=163840, norm_eps=1e-6
        ),
        moe=MoEConfig(
            hidden_size=7168,
            intermediate_size=2048,
            num_experts=384,
            top_k=8,
            shared_intermediate_size=2048,
            router=RouterConfig(score="sigmoid", weight_scale=2.827),
            balance=BalanceConfig(scope="sequence", coefficient=1e-4, bias_update_rate=0.001),
        ),
        attention=replace(LATENT, rotary_base=5e4),
        data=DataConfig(seq_len=4096, global_batch=16384, micro_batch=1),
        optim=OptimConfig(lr=2e-4, schedule="wsd", warmup_steps=500, decay_fraction=0.35),
        parallel=ParallelConfig(pp=16, ep=16),
    )
