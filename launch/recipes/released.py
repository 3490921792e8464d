"""Mixtral 8x7B, OLMoE, Pangu Pro MoE, Ling and MoE++ at their published sizes."""

from __future__ import annotations

from ...moe.config import (
    AttentionConfig,
    BalanceConfig,
    CapacityConfig,
    MoEConfig,
    RouterConfig,
    ZeroComputationConfig,
)
from ...moe.train.config import DataConfig, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from .common import at_scale


def mixtral_8x7b() -> TrainConfig:
    """Mixtral 8x7B: 46.7 billion parameters (12.9 billion active), eight wide experts, top-2, for 128 ranks.

    Jiang et al. 2024, arXiv 2401.04088. Gate weights are a softmax over the two chosen logits. The training is not
    published: the balance loss is that of the released configuration, 0.02 over a micro-batch; batch, learning rate and
    mesh are ours. ``mixtral`` is its routing in a small model.
    """
    return at_scale(
        steps=500_000,
        model=ModelConfig(num_layers=32, num_heads=32, intermediate_size=14336, vocab_size=32000),
        moe=MoEConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_experts=8,
            top_k=2,
            router=RouterConfig(softmax_after_topk=True),
            balance=BalanceConfig(scope="micro", coefficient=0.02),
        ),
        attention=AttentionConfig(num_kv_heads=8, rotary_base=1e6),
        data=DataConfig(seq_len=8192, global_batch=512, micro_batch=1),
        optim=OptimConfig(lr=3e-4, warmup_steps=2000),
        parallel=ParallelConfig(pp=4, ep=8),
    )


def olmoe() -> TrainConfig:
    """OLMoE-1B-7B: 6.9 billion parameters (1.3 billion active), 64 experts, top-8, for 256 ranks.

    Muennighoff et al. 2024, arXiv 2409.02060. Dropless; gate weights are scores without normalisation; balance loss
    0.01 over a micro-batch, z-loss 0.001; RMSNorm over all heads of queries and of keys; 1,024 sequences per step,
    5.1 trillion tokens. As in the paper, FSDP shards all weights, and there is no expert parallelism.
    """
    return at_scale(
        steps=1_223_842,
        model=ModelConfig(num_layers=16, num_heads=16, intermediate_size=1024, vocab_size=50304),
        moe=MoEConfig(
            hidden_size=2048,
            intermediate_size=1024,
            num_experts=64,
            top_k=8,
            router=RouterConfig(normalize_weights=False, z_loss=0.001),
            balance=BalanceConfig(scope="micro", coefficient=0.01),
        ),
        attention=AttentionConfig(qk_norm=True, qk_norm_over="all_heads"),
        data=DataConfig(seq_len=4096, global_batch=1024, micro_batch=1),
        optim=OptimConfig(lr=4e-4, warmup_steps=2500),
        parallel=ParallelConfig(),
    )


def pangu_pro_72b() -> TrainConfig:
    """Pangu Pro MoE: 72 billion parameters (16.5 billion active), one expert of each of eight groups, for 256 ranks.

    Tang et al. 2025, arXiv 2505.21411. Each of eight expert-parallel ranks holds one group of eight experts, and gets
    equally many rows from every token; a loss balances the experts of a group. Four shared experts. The coefficient,
    batch and learning rate are ours; the paper trains on 4,000 devices.
    """
    return at_scale(
        steps=775_000,
        model=ModelConfig(num_layers=48, num_heads=40, intermediate_size=12800, vocab_size=153376, norm_eps=1e-5),
        moe=MoEConfig(
            hidden_size=5120,
            intermediate_size=1344,
            num_experts=64,
            top_k=8,
            shared_intermediate_size=4 * 1344,
            router=RouterConfig(select="each_group", groups=8, normalize_weights=False),
            balance=BalanceConfig(scope="micro", coefficient=0.001),
        ),
        attention=AttentionConfig(num_kv_heads=8, head_width=128),
        data=DataConfig(seq_len=4096, global_batch=4096, micro_batch=1),
        optim=OptimConfig(lr=3e-4, warmup_steps=2000),
        parallel=ParallelConfig(pp=8, ep=8),
    )


def ling_lite() -> TrainConfig:
    """Ling-Lite: 16.8 billion parameters (2.75 billion active), two shared experts and 6 of 64, for 64 ranks.

    Ling Team 2025, arXiv 2503.05139. Dropless; normalised gate weights; balance loss 0.015, z-loss 0.0001; NormHead;
    random routing at first; learning rate 2.4e-4 after 2,000 steps of warm-up. The mesh is ours, and so is the number
    of steps with random routing, that of the warm-up.
    """
    return at_scale(
        steps=245_000,
        model=ModelConfig(
            num_layers=28, num_heads=16, intermediate_size=5632, vocab_size=126464, norm_eps=1e-6, norm_head=True
        ),
        moe=_ling(2048, 1408, top_k=6, shared=2),
        attention=AttentionConfig(num_kv_heads=4, rotary_base=6e5),
        data=DataConfig(seq_len=4096, global_batch=8960, micro_batch=1),
        optim=OptimConfig(lr=2.4e-4, schedule="wsd", warmup_steps=2000),
        parallel=ParallelConfig(ep=8),
    )


def ling_plus() -> TrainConfig:
    """Ling-Plus: 290 billion parameters (28.8 billion active), a shared expert and 4 of 64, for 1,024 ranks.

    Ling Team 2025, arXiv 2503.05139, trained as Ling-Lite. 8 pipeline stages, experts over 32 ranks; the mesh is ours.
    """
    return at_scale(
        steps=245_000,
        model=ModelConfig(
            num_layers=88, num_heads=42, intermediate_size=12288, vocab_size=126464, norm_eps=1e-6, norm_head=True
        ),
        moe=_ling(5376, 3072, top_k=4, shared=1),
        attention=AttentionConfig(num_kv_heads=6, rotary_base=6e5),
        data=DataConfig(seq_len=4096, global_batch=8960, micro_batch=1),
        optim=OptimConfig(lr=2.4e-4, schedule="wsd", warmup_steps=2000),
        parallel=ParallelConfig(pp=8, ep=32),
    )


def moepp_7b() -> TrainConfig:
    """MoE++ 7B/(16+4): 16 MLPs, one zero, one copy and two constant experts, top-2, for 64 ranks.

    Jin et al. 2024, arXiv 2410.07348. Logits of a layer also depend on those of the layer before. An expert gets 0.75
    choices per choice of one without computation, by the weighted balance loss of coefficient 0.01, and a capacity of
    1.1 in all. The mesh is ours; the paper's has eight pipeline stages, which gate "residual" does not allow here.
    """
    return at_scale(
        steps=240_000,
        model=ModelConfig(num_layers=24, num_heads=16, intermediate_size=4096, vocab_size=65536),
        moe=MoEConfig(
            hidden_size=1536,
            intermediate_size=4096,
            num_experts=16,
            top_k=2,
            router=RouterConfig(gate="residual"),
            zero_computation=ZeroComputationConfig(zero=1, copy=1, constant=2, tau=0.75),
            balance=BalanceConfig(scope="micro", coefficient=0.01),
            capacity=CapacityConfig(factor=1.1),
        ),
        data=DataConfig(seq_len=2048, global_batch=2048, micro_batch=4),
        optim=OptimConfig(lr=5e-4, warmup_steps=500),
        parallel=ParallelConfig(ep=16),
    )


def hmoe_3b() -> TrainConfig:
    """HMoE-3B: eight experts per block, from 2,304 to 5,888 wide, top-2, for 16 ranks.

    Wang et al. 2024, arXiv 2408.10681. The balance loss is the parameter penalty, which lets a token use a wide expert
    only if that is worth it. The order of experts gives four expert-parallel ranks equal widths. The paper prints 12
    blocks, with which this model would have as many parameters as its dense model of 1.32 billion; 24 give it those of
    the paper. Steps are for its 2.6e20 floating-point operations; the mesh is ours. The second variant of the paper is
    ``router.select="top_p"`` with ``entropy_loss=0.03``.
    """
    return at_scale(
        steps=24_000,
        model=ModelConfig(num_layers=24, num_heads=16, intermediate_size=4096, vocab_size=32000),
        moe=MoEConfig(
            hidden_size=1024,
            intermediate_size=4096,
            widths="2304,5888,2816,5376,3328,4864,3840,4352",
            num_experts=8,
            top_k=2,
            balance=BalanceConfig(coefficient=0.1),
        ),
        data=DataConfig(seq_len=4096, global_batch=640, micro_batch=2),
        optim=OptimConfig(lr=1e-4, schedule="constant", warmup_steps=1000, beta2=0.999, weight_decay=1e-5),
        parallel=ParallelConfig(ep=4),
    )


def _ling(hidden: int, width: int, top_k: int, shared: int) -> MoEConfig:
    return MoEConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_experts=64,
        top_k=top_k,
        shared_intermediate_size=shared * width,
        router=RouterConfig(z_loss=1e-4, random_steps=2000),
        balance=BalanceConfig(scope="micro", coefficient=0.015),
    )
