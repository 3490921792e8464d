"""A training run that takes seconds."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from equimoe.moe import MoEConfig
from equimoe.moe.train.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)

CONFIG = TrainConfig(
    steps=20,
    model=ModelConfig(num_layers=2, num_heads=2, intermediate_size=24),
    moe=MoEConfig(hidden_size=16, intermediate_size=12, num_experts=4, top_k=2),
    data=DataConfig(seq_len=16, global_batch=8, micro_batch=2, heldout_fraction=0.1),
    optim=OptimConfig(lr=1e-2, warmup_steps=4),
    parallel=ParallelConfig(timeout_s=60),
    checkpoint=CheckpointConfig(every=0),
    log=LogConfig(every=1, eval_every=0, eval_sequences=2, trackers=None),
)


def write_texts(folder: Path) -> Path:
    """Write made-up text of three domains with different alphabets; return ``folder``."""
    for number, words in enumerate(("alpha beta gamma", "one two three four", "x = y + z; return")):
        place = folder / f"domain{number}"
        place.mkdir(parents=True)
        for i in range(6):
            (place / f"{i}.txt").write_text(" ".join(words.split()[(i + j * j) % 3] for j in range(150)) + f" {i}")
    return folder


def on(folder: Path, ep: int = 1, **changes: object) -> TrainConfig:
    """Return the small run on the texts in ``folder``."""
    config = replace(CONFIG, data=replace(CONFIG.data, path=str(folder)), parallel=replace(CONFIG.parallel, ep=ep))
    return changed(config, **changes)


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    """Replace fields of a run, or of its MoE layers."""
    names = {field.name for field in fields(TrainConfig)}
    layer = {name: value for name, value in changes.items() if name not in names}
    run = {name: value for name, value in changes.items() if name in names}
    return replace(config, **{"moe": replace(config.moe, **layer), **run})
