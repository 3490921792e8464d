"""The form of an expert's MLP."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

#: fp32 tensors to which the gradients of gate_up and down are added; None: autograd gets the gradient
MainGrads = tuple[Tensor | None, Tensor | None]


class MLPOptions(NamedTuple):
    """An expert computes ``act(x @ gate.T) * (x @ up.T)`` if gated, else ``act(x @ up.T)``, then the down projection.

    ``activation`` is a key of ``ACTIVATIONS``.
    """

    activation: str = "silu"
    gated: bool = True
