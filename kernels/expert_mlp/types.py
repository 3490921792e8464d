"""Which MLP an expert is."""

from __future__ import annotations

from typing import NamedTuple


class MLPOptions(NamedTuple):
    """``act(x @ gate.T) * (x @ up.T)`` when gated, else ``act(x @ up.T)``; act is one of ACTIVATIONS."""

    activation: str = "silu"
    gated: bool = True
