"""The activation functions of experts, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


class Activation(NamedTuple):
    """An activation and its gradient. Both write to the keyword argument ``out``, which must not overlap an input."""

    #: act(z); a new tensor if ``out`` is None
    value: Callable[..., Tensor]
    #: dy * act'(z), from dy and z
    gradient: Callable[..., Tensor]


def _silu_gradient(dy: Tensor, z: Tensor, out: Tensor) -> Tensor:
    return _aten.silu_backward.grad_input(dy, z, grad_input=out)


def _gelu_gradient(dy: Tensor, z: Tensor, out: Tensor, approximate: str) -> Tensor:
    return _aten.gelu_backward.grad_input(dy, z, approximate=approximate, grad_input=out)


def _relu2(z: Tensor, out: Tensor | None) -> Tensor:
    return torch.clamp(z, min=0, out=out).square_()


def _relu2_gradient(dy: Tensor, z: Tensor, out: Tensor) -> Tensor:
    return torch.clamp(z, min=0, out=out).mul_(dy).mul_(2)


def _gelu(approximate: str) -> Activation:
    value = partial(F.gelu, approximate=approximate)
    return Activation(value, partial(_gelu_gradient, approximate=approximate))


#: by name: SiLU; GELU with the error function; GELU with tanh; the square of ReLU (So et al. 2021, arXiv 2109.08668)
ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(torch._C._nn.silu, _silu_gradient),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "relu2": Activation(_relu2, _relu2_gradient),
}
