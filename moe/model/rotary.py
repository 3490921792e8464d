"""Rotary positions (arXiv 2104.09864): their sines and cosines, and the rotation.  S positions, R rotated channels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...kernels._autograd import result
from ..config import RotaryScaling


def rotary_tables(seq_len: int, width: int, base: float, scaling: RotaryScaling | None = None) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines [S, R / 2] of the angles of all positions."""
    frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    if scaling is not None:
        frequency = SCALINGS[scaling.kind](frequency, base, scaling)
    angle_SR = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequency)
    if scaling is None or scaling.magnitude == 1.0:
        return angle_SR.cos().float(), angle_SR.sin().float()
    return (angle_SR.cos() * scaling.magnitude).float(), (angle_SR.sin() * scaling.magnitude).float()


def rotate(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each channel pair (i, i + R/2) of [..., S, R] by an angle with this cosine and sine, [..., S, R / 2]."""
    return cast(Tensor, _Rotate.apply(t, cos.to(t.dtype), sin.to(t.dtype)))


class _Rotate(torch.autograd.Function):
    """Computes whole rows at once; autograd would split and join them in the forward, and again in the backward."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return result(_rotated(t, cos, sin))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(dy, cos, -sin), None, None  # the inverse rotation


def _rotated(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    other_halves = t.roll(t.shape[-1] // 2, -1)
    return (t * torch.cat((cos, cos), -1)).addcmul_(other_halves, torch.cat((-sin, sin), -1))


def _linear(frequency: Tensor, base: float, scaling: RotaryScaling) -> Tensor:
    return frequency / scaling.factor


def _yarn(frequency: Tensor, base: float, scaling: RotaryScaling) -> Tensor:
    """Blend linearly in the number of the channel pair, between the two pairs with ``fast`` and ``slow_turns``."""
    width = 2 * len(frequency)

    def pair(turns: float) -> float:
        return width * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = max(math.floor(pair(scaling.fast_turns)), 0), min(math.ceil(pair(scaling.slow_turns)), width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float64) - first) / (last - first or 0.001)
    slow = ramp.clamp(0, 1)
    return frequency / scaling.factor * slow + frequency * (1 - slow)


def _llama3(frequency: Tensor, base: float, scaling: RotaryScaling) -> Tensor:
    """Blend linearly in the number of turns over the original length, between ``slow`` and ``fast_turns``."""
    turns = scaling.original_length * frequency / (2 * math.pi)
    fast = ((turns - scaling.slow_turns) / (scaling.fast_turns - scaling.slow_turns)).clamp(0, 1)
    return frequency / scaling.factor * (1 - fast) + frequency * fast


#: ``RotaryScaling.kind`` -> function that slows frequencies down
SCALINGS: dict[str, Callable[[Tensor, float, RotaryScaling], Tensor]] = {
    "linear": _linear,
    "yarn": _yarn,
    "llama3": _llama3,
}
