"""The form of an expert's MLP."""

from __future__ import annotations

from typing import NamedTuple


class MLPOptions(NamedTuple):
    """An expert computes ``act(x @ gate.T) * (x @ up.T)`` if gated, else ``act(x @ up.T)``, then the down projection.

    ``activation`` is a key of ``ACTIVATIONS``.
    """

    activation: str = "silu"
    gated: bool = True
