"""The checks of an op's inputs, and when an op may read a tensor's values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def has_values(t: Tensor) -> bool:
    """Return False for a tensor that has only a shape (meta device, FakeTensorMode)."""
    return not t.is_meta and not isinstance(t, FakeTensor)


def on_host(t: Tensor) -> bool:
    """Tell whether a tensor is on the CPU and has values."""
    return t.is_cpu and has_values(t)


def readable(t: Tensor) -> bool:
    """Tell whether an op may read a tensor's values: on the CPU, but not while tracing or in a dry run."""
    return on_host(t) and not torch.compiler.is_compiling()


def backend_without_values(backend: str, t: Tensor) -> str:
    """Return "torch" for "reference" and a tensor without values, which the reference cannot read; else ``backend``."""
    return "torch" if backend == "reference" and not has_values(t) else backend


def check_device(device: torch.device, **tensors: Tensor | None) -> None:
    """Raise ValueError if a tensor is on another device than ``device``; None is skipped."""
    for name, t in tensors.items():
        if t is not None and t.device != device:
            raise ValueError(f"{name} is on {t.device}: move it to {device}, where the op's other inputs are")


def check_offsets(offsets_E: Tensor, num_rows: int) -> None:
    """Raise ValueError unless offsets are int64 [E+1] and, if readable, ascend from 0 to at most ``num_rows``."""
    if offsets_E.dim() != 1 or offsets_E.dtype != torch.int64 or offsets_E.shape[0] == 0:
        raise ValueError(f"offsets_E={offsets_E.dtype}{list(offsets_E.shape)}: must be int64 [E + 1]")
    if readable(offsets_E):
        offsets = offsets_E.tolist()
        if offsets[0] != 0 or offsets != sorted(offsets):
            raise ValueError(f"offsets_E={_short(offsets)}: must begin at 0 and never decrease")
        if offsets[-1] > num_rows:
            raise ValueError(f"offsets_E={_short(offsets)}: must end at {num_rows}, the number of rows, or less")


def check_index(name: str, index_R: Tensor, sources: int) -> None:
    """Raise ValueError unless an index is int64 [R] and, if readable, has entries in [0, sources) only."""
    if index_R.dim() != 1 or index_R.dtype != torch.int64:
        raise ValueError(f"{name}={index_R.dtype}{list(index_R.shape)}: must be int64 [R], one entry per row")
    if index_R.shape[0] and sources == 0:
        raise ValueError(f"{name}=int64{list(index_R.shape)}: there are no rows to gather")
    if readable(index_R) and index_R.shape[0]:
        least, most = index_R.aminmax()
        if least.item() < 0 or most.item() >= sources:
            raise ValueError(f"{name} in [{int(least)}, {int(most)}]: entries must lie in 0..{sources - 1}")


def _short(values: list[int]) -> str:
    """Print at most eight of the values."""
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:7]))}, ..., {values[-1]}]"
