"""Helpers shared by the Triton backends. This module can be imported without triton."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def launch_on(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context that makes ``tensor``'s device current, because Triton launches on the current device.

    Raises ValueError for a CPU tensor unless Triton interprets its kernels (``TRITON_INTERPRET=1``).
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        from ._interpreter import correct_interpreter  # only here: it imports triton

        correct_interpreter()
    elif tensor.device.type == "cpu":
        raise ValueError("backend='triton': the tensors are on the CPU; move them to a GPU or use backend='torch'")
    return torch.cuda.device_of(tensor)


def backend_without_fp64(backend: str, dtype: torch.dtype) -> str:
    """Return "torch" for "auto" and fp64, because the Triton matrix kernels lack fp64; else ``backend``."""
    return "torch" if backend == "auto" and dtype == torch.float64 else backend


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` >= 1."""
    return 1 << (n - 1).bit_length()
