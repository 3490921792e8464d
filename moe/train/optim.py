"""AdamW and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .config import OptimConfig


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW for the trainable parameters. Weight decay applies to matrices only, not to vectors such as norms.

    The parameters are fp32 master weights, also in bf16 training.
    """
    groups: dict[tuple[bool, Any], list[nn.Parameter]] = {}
    for parameter in (p for p in parameters if p.requires_grad):
        # a fused update of one group cannot mix plain tensors and DTensors, or DTensors of different meshes
        groups.setdefault((parameter.dim() > 1, getattr(parameter, "device_mesh", None)), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": group, "weight_decay": config.weight_decay if decays else 0.0}
            for (decays, _), group in groups.items()
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of ``step`` (from 0) in a run of ``steps``: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, steps - math.ceil(config.decay_fraction * steps))
    if step < start:
        return config.lr
    progress = (step - start + 1) / max(steps - start, 1)
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * falling)
