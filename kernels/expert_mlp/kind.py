"""Which MLP an expert is."""

from __future__ import annotations

from typing import NamedTuple

#: SiLU; GELU by the error function; GELU by tanh; the square of ReLU (So et al. 2021, arXiv 2109.08668)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")


class Kind(NamedTuple):
    """``act(x @ gate.T) * (x @ up.T)`` when gated, else ``act(x @ up.T)``; act is one of ACTIVATIONS."""

    activation: str = "silu"
    gated: bool = True
