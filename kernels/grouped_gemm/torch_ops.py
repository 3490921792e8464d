"""On a CPU, one product per expert; elsewhere, and in compiled code, grouped products that wait for no values."""

# R rows sorted by expert, E experts, K in width, N out width.

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ..checks import readable
from ..cpu import grouped_gemm as cpu
from . import accelerator


def _path(rows: Tensor) -> ModuleType:
    return cpu if readable(rows) else accelerator


def forward(rows: Tensor, weight_ENK: Tensor, offsets_E: Tensor, index_R: Tensor | None) -> Tensor:
    return _path(rows).forward(rows, weight_ENK, offsets_E, index_R)


def dgrad(dy_RN: Tensor, weight_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    return forward(dy_RN, weight_ENK.mT, offsets_E, None)


def wgrad(
    dy: Tensor, rows: Tensor, offsets_E: Tensor, dy_index_R: Tensor | None, index_R: Tensor | None, out: Tensor | None
) -> Tensor:
    return _path(rows).wgrad(dy, rows, offsets_E, dy_index_R, index_R, out)
