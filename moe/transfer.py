"""Copies between the host and a device for which the host does not wait."""

from __future__ import annotations

import torch
from torch import Tensor


class Reading:
    """Values that are on their way from a device to the host. Only :meth:`get` waits for them.

    Values that are on the host already are the tensor itself.
    """

    def __init__(self, value: Tensor) -> None:
        self._value, self._copied = value.detach(), None
        if value.is_cuda:
            self._value = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
            self._value.copy_(value.detach(), non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(value.device))

    def get(self) -> Tensor:
        """Wait for the values, and return them as a tensor on the host."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        return self._value


def to_device(t: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; from the host through pinned memory, so that the host need not wait for the copy."""
    if device.type != "cuda" or not t.is_cpu:
        return t.to(device)
    return t.pin_memory().to(device, non_blocking=True)
