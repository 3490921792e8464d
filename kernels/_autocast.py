"""The dtypes of an op under autocast, in both passes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on a device; None where it is off."""
    kind = device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)  # which raises for meta, where autocast does not exist
    return torch.get_autocast_dtype(kind) if on else None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which torch's functions keep the dtypes of their inputs.

    ``pick`` enters it for every op. A backward pass that multiplies matrices enters it as well, because autocast may be
    on in either pass alone.
    """
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)
