"""The tensors of a run, by names that do not depend on the mesh: weights, AdamW's moments, random generators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: what AdamW keeps of a weight
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def training_state(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, generators: dict[str, Tensor]
) -> dict[str, Tensor]:
    """All weights, moments and generators. Reading them changes nothing.

    A weight has moments if ``optimizer`` (AdamW) updates it, or has done so before the weight was frozen. Before its
    first step they are new zeros, which :func:`restore_optimizer` hands to the optimizer after
    :func:`equimoe.moe.checkpoint.load`.
    """
    state = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, moments in _moments(parameters, optimizer).items():
        state |= {f"optimizer.{name}.{key}": value for key, value in moments.items()}
    return state | {f"generator.{name}": value for name, value in generators.items()}


def restore_optimizer(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: dict[str, Tensor]
) -> None:
    """Make the moments in a loaded ``state`` those of ``optimizer``."""
    for name, moments in _moments(parameters, optimizer).items():
        optimizer.state[parameters[name]] = {key: state[f"optimizer.{name}.{key}"] for key in moments}


def expect_moments(frozen: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Give frozen weights that ``optimizer`` holds new moments, which a checkpoint's will replace."""
    groups = _groups(optimizer)
    for parameter in frozen.values():
        if not optimizer.state.get(parameter):
            optimizer.state[parameter] = _new_moments(parameter, groups[id(parameter)])


def _moments(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    groups = _groups(optimizer)
    return {
        name: optimizer.state.get(parameter) or _new_moments(parameter, groups[id(parameter)])
        for name, parameter in parameters.items()
        if id(parameter) in groups and (parameter.requires_grad or optimizer.state.get(parameter))
    }


def _groups(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    return {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}


def _new_moments(parameter: nn.Parameter, group: dict[str, object]) -> dict[str, Tensor]:
    """Moments as AdamW makes them in its first step."""
    # kernels that update on the device count there; a counter on the CPU would be an illegal access
    on_device = group.get("fused") or group.get("capturable")
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu"),
        "exp_avg": torch.zeros_like(parameter.detach()),
        "exp_avg_sq": torch.zeros_like(parameter.detach()),
    }
