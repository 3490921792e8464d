"""Keeps an op's dtypes under autocast, in the forward and the backward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype that autocast uses on a device, or None if autocast is off there."""
    if not torch._C._is_any_autocast_enabled():  # nearly always
        return None
    name = device.type
    on = name != "meta" and torch.is_autocast_enabled(name)  # this call raises for the meta device
    return torch.get_autocast_dtype(name) if on else None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast is off.

    ``pick`` enters it for every op. Backward passes that multiply matrices enter it too, because autocast may be on in
    only one of the two passes.
    """
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)
