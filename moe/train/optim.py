"""The optimizer and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..engines.optimizers import Lamb, Muon
from .config import OptimConfig, TrainConfig

#: (trainable weights by name, configuration) -> their optimizer
Build = Callable[[Mapping[str, nn.Parameter], OptimConfig], Optimizer]
#: parts of names of matrices that map from or to something else than hidden states, and of stacks of vectors; Muon
#: leaves them to AdamW
_ENDS = (".embedding.", ".head.", ".router.", ".gate.", ".bias.", ".mixing.", ".vectors.", ".pool.")


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> Optimizer:
    """Build the optimizer of the trainable parameters, by name. Weight decay applies to matrices only, not to vectors.

    The parameters are fp32 master weights, also in bf16 training.
    """
    return OPTIMIZERS[config.name]({name: p for name, p in parameters.items() if p.requires_grad}, config)


def _adamw(weights: Mapping[str, nn.Parameter], config: OptimConfig) -> Optimizer:
    return torch.optim.AdamW(_groups(weights, config), **_adam_settings(config), fused=True)


def _lamb(weights: Mapping[str, nn.Parameter], config: OptimConfig) -> Optimizer:
    return Lamb(_groups(weights, config), **_adam_settings(config))


def _muon(weights: Mapping[str, nn.Parameter], config: OptimConfig) -> Optimizer:
    inner = {name: p for name, p in weights.items() if p.dim() > 1 and not any(end in f".{name}." for end in _ENDS)}
    others = {name: p for name, p in weights.items() if name not in inner}
    groups = [*({**group, "orthogonal": True} for group in _groups(inner, config)), *_groups(others, config)]
    return Muon(groups, **_adam_settings(config), momentum=config.momentum)


def _adam_settings(config: OptimConfig) -> dict[str, Any]:
    return {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}


def _groups(weights: Mapping[str, nn.Parameter], config: OptimConfig) -> list[dict[str, Any]]:
    groups: dict[tuple[bool, Any], list[nn.Parameter]] = {}
    for weight in weights.values():
        # a fused update of one group cannot mix plain tensors and DTensors, or DTensors of different meshes
        groups.setdefault((weight.dim() > 1, getattr(weight, "device_mesh", None)), []).append(weight)
    return [
        {"params": group, "weight_decay": config.weight_decay if decays else 0.0}
        for (decays, _), group in groups.items()
    ]


#: name in the configuration -> builder of the optimizer
OPTIMIZERS: dict[str, Build] = {"adamw": _adamw, "lamb": _lamb, "muon": _muon}


def rise_on_resume(saved: OptimConfig, saved_steps: int, config: TrainConfig, step: int) -> tuple[float, float] | None:
    """Return the learning rates of the last step and of the next one, ``step``, if a changed schedule raises it.

    Else return None, also if the rate would have risen with the ``saved`` schedule, or rises in the warm-up.
    """
    if step < config.optim.warmup_steps:
        return None
    batch = config.data.global_batch
    tokens = step * batch * config.data.seq_len
    last = learning_rate(saved, step - 1, saved_steps, batch, tokens)
    now = learning_rate(config.optim, step, config.steps, batch, tokens)
    planned = max(last, learning_rate(saved, min(step, saved_steps - 1), saved_steps, batch, tokens))
    return (last, now) if now > 1.1 * planned else None


def learning_rate(config: OptimConfig, step: int, steps: int, sequences: int = 1, tokens: int = 1) -> float:
    """Return the learning rate of ``step`` (from 0) in a run of ``steps``: linear warm-up, then the schedule.

    Schedule "power" also depends on the step's number of ``sequences``, and on the ``tokens`` that have been trained on
    when it ends.
    """
    highest = config.lr
    if config.schedule == "power":
        highest = min(highest, sequences * config.power_amplitude / tokens**config.power_exponent)
    if step < config.warmup_steps:
        return highest * (step + 1) / config.warmup_steps
    start = config.warmup_steps
    if config.schedule in ("wsd", "power"):
        start = max(start, steps - math.ceil(config.decay_fraction * steps))
    if step < start or config.schedule == "constant":
        return highest
    progress = (step - start + 1) / max(steps - start, 1)
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return highest * (config.min_lr_ratio + (1 - config.min_lr_ratio) * falling)
