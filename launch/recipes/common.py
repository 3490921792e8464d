"""What the recipes at published sizes share."""

from __future__ import annotations

from dataclasses import replace

from ...moe.config import AttentionConfig, MoEConfig
from ...moe.train.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)


def at_scale(
    *,
    steps: int,
    model: ModelConfig,
    moe: MoEConfig,
    data: DataConfig,
    optim: OptimConfig,
    parallel: ParallelConfig,
    attention: AttentionConfig | None = None,
) -> TrainConfig:
    """Return a run on many GPUs: bf16 with FSDP2, recomputed blocks, and patience with a slow cluster."""
    return TrainConfig(
        steps=steps,
        dtype="bfloat16",
        model=replace(model, recompute=True),
        moe=moe,
        attention=attention or AttentionConfig(),
        data=data,
        optim=optim,
        parallel=replace(parallel, data_parallel="fsdp", timeout_s=1800.0),
        checkpoint=CheckpointConfig(every=500),
        log=LogConfig(every=10, eval_every=1000, eval_sequences=64),
    )
