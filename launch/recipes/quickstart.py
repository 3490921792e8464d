"""A first training run: a few minutes on the CPU of a laptop."""

from __future__ import annotations

from ...moe.config import BalanceConfig, MoEConfig
from ...moe.train.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)


def quickstart() -> TrainConfig:
    """A small byte-level model for one or two CPU processes, trained on the text that comes with Python.

    Each optimizer step has 16 sequences of 256 bytes in two micro-batches: both on one process, or one on each of two,
    which then also share the experts. The load is balanced over all 16 sequences.
    """
    return TrainConfig(
        steps=300,
        model=ModelConfig(num_layers=4, num_heads=6, intermediate_size=512, moe_every=1),
        moe=MoEConfig(
            hidden_size=192,
            intermediate_size=192,
            num_experts=8,
            top_k=2,
            balance=BalanceConfig(scope="global", coefficient=0.01),
        ),
        data=DataConfig(seq_len=256, global_batch=16, micro_batch=8, builtin_bytes_per_domain=2_000_000),
        optim=OptimConfig(lr=3e-3, warmup_steps=20),
        parallel=ParallelConfig(ep=-1),
        checkpoint=CheckpointConfig(every=100),
        log=LogConfig(every=10, eval_every=100),
    )
