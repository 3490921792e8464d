"""Names the tensors of a run independently of the mesh: weights, the optimizer's moments, random generators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: AdamW's state of a weight; other optimizers have a part of it, and their groups say in "moments" which
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def training_state(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, generators: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return all weights, moments and generators by name. Changes nothing.

    A weight has moments if ``optimizer`` updates it, or did so before the weight was frozen. Before the first
    step they are new zeros, which the optimizer does not know: after :func:`equimoe.moe.checkpoint.load` has filled
    them, :func:`restore_optimizer` gives them to the optimizer.
    """
    state = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, moments in _moments(parameters, optimizer).items():
        state |= {f"optimizer.{name}.{key}": value for key, value in moments.items()}
    return state | {f"generator.{name}": value for name, value in generators.items()}


def restore_optimizer(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: dict[str, Tensor]
) -> None:
    """Give the moments in a loaded ``state`` to ``optimizer``."""
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


def _new_moments(parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, Tensor]:
    """Return the moments that the optimizer would create in its first step."""
    # fused and capturable kernels read the step counter on the device; a counter on the CPU would be an illegal access
    on_device = group.get("fused") or group.get("capturable")
    step = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
    return {"step": step, **{name: torch.zeros_like(parameter.detach()) for name in group.get("moments", MOMENTS[1:])}}
