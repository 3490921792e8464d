"""Gradient scalers, which multiply a loss and later divide the gradients, and so would divide attached losses too."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import FrameType

import torch
from torch import Tensor, nn


def use_gradient_scaler(model: nn.Module, scaler: torch.amp.GradScaler) -> None:
    """Multiply the balance losses of all MoE layers of ``model`` by ``scaler``'s scale, as the loop does its own loss.

    Without this call, the first update with a gradient scaler raises. A copy of a layer needs a call of its own.
    """
    for module in model.modules():
        balancer = getattr(module, "balancer", None)
        if balancer is not None:
            balancer.scaler = scaler


def current_scale(scaler: torch.amp.GradScaler, device: torch.device) -> Tensor:
    """Return the scale on ``device``, fp32, without waiting for it (as ``get_scale`` does); 1 if ``scaler`` is off."""
    return scaler.scale(torch.ones((), device=device))


def updating_scaler() -> torch.amp.GradScaler | None:
    """Return the gradient scaler whose ``step`` has called the optimizer that is now stepping, if there is one."""
    for frame in _callers():
        if frame.f_code.co_name == "step":
            found = frame.f_locals.get("self")
            if isinstance(found, torch.amp.GradScaler) and found.is_enabled():
                return found
    return None


def _callers() -> Iterator[FrameType]:
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back
