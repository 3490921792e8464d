"""Gradient scalers: a loop multiplies its loss by a scale, and divides all gradients by it before the update.

Attached losses have no value that the loop could multiply, so the division alone would make their gradients too small.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FrameType, FunctionType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .balancer import Balancer

#: a ``torch.amp.GradScaler``, or DeepSpeed's engine in fp16, whose optimizer has the scale
Scaler: TypeAlias = Any


def use_gradient_scaler(model: nn.Module, scaler: Scaler) -> None:
    """Multiply the balance losses of all MoE layers of ``model`` by ``scaler``'s scale, as the loop does its own loss.

    ``scaler`` is a ``torch.amp.GradScaler``, or the engine of DeepSpeed in its fp16 mode.

    Call it before the first backward of a step. Without this call, the first update that ``scaler.step`` makes raises.
    Unscaling that is not followed by ``scaler.step`` is not noticed: ``scaler.unscale_(optimizer)`` before
    ``optimizer.step()``, a scale that you divide by yourself, and scalers that do not inherit from torch's. A copy of a
    layer needs a call of its own.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"use_gradient_scaler: model is a {type(model).__name__}; pass the nn.Module first")
    if not isinstance(scaler, torch.amp.GradScaler) and _engine_scale(scaler) is None:
        raise ValueError(
            f"use_gradient_scaler: scaler is a {type(scaler).__name__}; pass the torch.amp.GradScaler that your loop "
            "uses, or DeepSpeed's engine, or for another kind give its scale: MoE.place(Placement(..., "
            "gradient_scale=function))"
        )
    found: list[Balancer | None] = [getattr(module, "balancer", None) for module in model.modules()]
    balancers = [balancer for balancer in found if balancer is not None]
    if not balancers:
        raise ValueError(f"use_gradient_scaler: {type(model).__name__} has no MoE layer; pass the model that has them")
    for balancer in balancers:
        if balancer.placed is not None:
            refuse_two_scales(scaler, balancer.placed.gradient_scale)
        if scaler is not balancer.scaler and _has_gradients(balancer):
            raise ValueError(
                "use_gradient_scaler: a backward of this step has already run without the scaler; call it before the "
                "first backward of a step, or after optimizer.zero_grad()"
            )
    for balancer in balancers:
        balancer.scaler = scaler


def refuse_two_scales(scaler: Scaler | None, gradient_scale: object) -> None:
    """Raise ValueError if both a gradient scaler and a placement's function give the scale of the losses."""
    if scaler is not None and callable(gradient_scale):
        raise ValueError(
            "Placement.gradient_scale is a function, and the losses would be multiplied by the scale of "
            "use_gradient_scaler as well; do not call use_gradient_scaler, or give a number as gradient_scale"
        )


def _has_gradients(balancer: Balancer) -> bool:
    """Return whether a backward of the current step has left gradients, or may have."""
    if not (balancer.has_attached_losses and any(v.done for v in balancer.layer.visits.values())):
        return False
    weights = [p for p in balancer.layer.weights() if isinstance(p, nn.Parameter) and p.requires_grad]
    return not weights or any(p.grad is not None and bool(p.grad.any()) for p in weights)


def current_scale(scaler: Scaler, device: torch.device | str) -> Tensor:
    """Return the scale on ``device``, fp32, without waiting for it (as ``get_scale`` does); 1 if ``scaler`` is off."""
    if isinstance(scaler, torch.amp.GradScaler):
        return scaler.scale(torch.ones((), device=device))
    return torch.full((), _engine_scale(scaler) or 1.0, device=device)


def _engine_scale(engine: Any) -> float | None:
    """Return the scale of DeepSpeed's loss; None if ``engine`` has none."""
    found = getattr(getattr(engine, "optimizer", None), "loss_scale", None)
    return float(found) if isinstance(found, (int, float)) else None


def updating_scaler() -> Scaler | None:
    """Return the gradient scaler that has called the optimizer that is now stepping, if there is one."""
    kinds: list[type] = [torch.amp.GradScaler]
    if deepspeed := sys.modules.get("deepspeed.runtime.engine"):
        kinds.append(deepspeed.DeepSpeedEngine)
    codes = {code for kind in kinds for code in _codes_of_methods(kind)}
    for frame in _callers():
        if frame.f_code in codes:  # reading f_locals of other frames could keep variables alive that were deleted
            found = frame.f_locals.get(frame.f_code.co_varnames[0])
            if isinstance(found, torch.amp.GradScaler):
                if found.is_enabled():
                    return found
            elif (_engine_scale(found) or 1.0) != 1.0:
                return found
    return None


def _codes_of_methods(kind: type) -> Iterator[CodeType]:
    for method in vars(kind).values():
        if isinstance(method, FunctionType) and method.__code__.co_argcount:
            yield method.__code__
    subclasses: list[type] = kind.__subclasses__()
    for subclass in subclasses:
        yield from _codes_of_methods(subclass)


def _callers() -> Iterator[FrameType]:
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back
