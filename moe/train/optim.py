"""AdamW and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .config import OptimConfig, TrainConfig


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


def rise_on_resume(saved: OptimConfig, saved_steps: int, config: TrainConfig, step: int) -> tuple[float, float] | None:
    """Return the learning rates of the last step and of the next one, ``step``, if a changed schedule raises it.

    Else return None, also if the rate would have risen with the ``saved`` schedule, or rises in the warm-up.
    """
    if step < config.optim.warmup_steps:
        return None
    last, now = learning_rate(saved, step - 1, saved_steps), learning_rate(config.optim, step, config.steps)
    planned = max(last, learning_rate(saved, min(step, saved_steps - 1), saved_steps))
    return (last, now) if now > 1.1 * planned else None


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of ``step`` (from 0) in a run of ``steps``: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, steps - math.ceil(config.decay_fraction * steps))
    if step < start or config.schedule == "constant":
        return config.lr
    progress = (step - start + 1) / max(steps - start, 1)
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * falling)
