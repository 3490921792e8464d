"""When an op may look at the values that it was given, and what it checks without looking."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def readable(t: Tensor) -> bool:
    """Whether a tensor has values, and reading them makes nobody wait: on the CPU, but not in a trace or a dry run."""
    return not torch.compiler.is_compiling() and t.device.type == "cpu" and not isinstance(t, FakeTensor)


def reads_no_values(backend: str, t: Tensor) -> str:
    """``backend``, but "torch" instead of "reference" for a tensor that has only a shape (meta, FakeTensorMode)."""
    shape_only = t.device.type == "meta" or isinstance(t, FakeTensor)
    return "torch" if backend == "reference" and shape_only else backend


def check_device(device: torch.device, **tensors: Tensor | None) -> None:
    """Raises ValueError for a tensor that is on another device; None is on any."""
    for name, t in tensors.items():
        if t is not None and t.device != device:
            raise ValueError(f"{name} is on {t.device}: move it to {device}, where the op's other inputs are")


def without_autocast(t: Tensor) -> AbstractContextManager[object]:
    """No autocast on ``t``'s device; a device that has none (meta) needs nothing."""
    kind = t.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
